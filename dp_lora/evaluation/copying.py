"""Whether samples are copies: how near each lies to a private training picture, beside pictures that nobody trained on.

Publish nothing of this. A distance to the nearest training picture is a function of that one picture, without noise:
whoever is told that a sample has a copy, or how near it lies, learns who was in the training. Two published counts,
before and after somebody joined, say whether the samples look like that person. The guarantee of the samples does not
help: the numbers read the private pictures again. The pairs show training pictures themselves: their file lies
beside the private caches, in no folder that DVC, a run or a release keeps, and goes when a picture is withdrawn.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from dp_lora.data.contact_sheet import GAP, LINE, SIDE, enlarged, font
from dp_lora.data.layout import Dataset
from dp_lora.errors import PRIVATE_PICTURE, private_names
from dp_lora.evaluation.features import FeatureSets
from dp_lora.evaluation.intervals import share_interval
from dp_lora.evaluation.measurement import Measurement
from dp_lora.evaluation.nearest import nearest
from dp_lora.evaluation.pictures import utility_pictures
from dp_lora.files import whole_file

NEAR = 0.05  # root mean square of the difference, as a share of the range from black to white
QUANTILE = 0.01  # of the held-out pictures' distances
PAIRS, COLUMNS = 10, 2
HEAD = 3 * LINE  # pixels above the pairs


@dataclass(frozen=True)
class Distances:
    """To the nearest training picture: of samples (n,), that picture's row (n,), and of held-out pictures (m,)."""

    samples: NDArray[np.float64]
    rows: NDArray[np.int64]
    held_out: NDArray[np.float64]

    @cached_property
    def usual(self) -> float:
        """The distance that all but a hundredth of the held-out pictures reach or exceed."""
        return float(np.quantile(self.held_out, QUANTILE))

    @property
    def relative(self) -> NDArray[np.float64]:
        """The samples' distances divided by `usual`, (n,): below 1 is nearer than held-out pictures are."""
        return self.samples / max(self.usual, np.finfo(np.float64).tiny)

    @property
    def nearer(self) -> int:
        """Number of samples nearer than `usual`."""
        return int((self.samples < self.usual).sum())


@dataclass(frozen=True)
class Copying:
    """Distances in features and in pixels (root mean square, 0 to 1), and how many samples equal a training picture."""

    features: Distances
    pixels: Distances
    exact: int
    shown: str  # the features, in words

    def scores(self) -> list[Measurement]:
        n, m = len(self.pixels.samples), len(self.pixels.held_out)
        near, usual = (int((of <= NEAR).sum()) for of in (self.pixels.samples, self.pixels.held_out))
        what = f"whose pixels differ from a training picture's by {NEAR:g} of the range or less"
        return [
            _count("exact_copies", self.exact, f"of {n} samples: equal to a training picture"),
            _count("near_copies", near, f"of {n} samples: {what}"),
            _count("near_copies_held_out", usual, f"of {m} held-out pictures: {what}"),
            self._share("nearer_than_held_out", self.features, self.shown),
            self._share("nearer_than_held_out_pixels", self.pixels, "pixels"),
        ]

    def _share(self, name: str, of: Distances, shown: str) -> Measurement:
        n = len(of.samples)
        meaning = (
            f"share of {n} samples nearer to a training picture than the {QUANTILE:.0%} quantile of "
            f"{len(of.held_out)} held-out pictures (about {QUANTILE:g} without copying); {shown}"
        )
        return Measurement(name, of.nearer / n, meaning, True, *share_interval(of.nearer, n))


def _count(name: str, value: int, meaning: str) -> Measurement:
    return Measurement(name, value, meaning, private=True)


@private_names(PRIVATE_PICTURE)
def look_for_copies(features: FeatureSets) -> Copying:
    """Distance of every sample, and of every held-out picture, to its nearest training picture.

    Pictures above 64 pixels are compared at 64. Needs test pictures: they are the held-out ones.
    """
    sets, device = features.sets, features.sets.base.device
    test = sets.test
    assert test is not None, "no test pictures were prepared"
    facts = {"real": sets.real.digest(), "test": test.digest()}
    held_out = sets.cache.array(
        f"{features.space.name}-nearest-test",
        {**facts, "features": features.space.facts},
        lambda: nearest(features.test, features.real, device)[0],
    )
    in_features = Distances(*nearest(features.samples, features.real, device), held_out)
    samples, real = (_flat(dataset) for dataset in (sets.samples, sets.real))
    scale = 255 * np.sqrt(real.shape[1])
    held_out = sets.cache.array("pixels-nearest-test", facts, lambda: nearest(_flat(test), real, device)[0])
    distance, rows = nearest(samples, real, device)
    in_pixels = Distances(distance / scale, rows, held_out / scale)
    # pictures that are equal at 64 pixels may differ at their own size
    alike = np.flatnonzero(distance == 0)
    exact = sum(_equal(sets.samples, int(i), sets.real, int(rows[i])) for i in alike)
    return Copying(in_features, in_pixels, exact, features.space.shown)


def _flat(dataset: Dataset) -> NDArray[np.uint8]:
    images = utility_pictures(dataset)
    return images.reshape(len(images), -1)


def _equal(one: Dataset, row: int, other: Dataset, other_row: int) -> bool:
    return bool(np.array_equal(one.images([row]), other.images([other_row])))


def write_distances(path: Path, copying: Copying) -> None:
    """A plot of both distributions: the share of samples, and of held-out pictures, that lie so near or nearer."""
    figure = Figure(figsize=(11, 4.2), dpi=110, layout="constrained")
    figure.suptitle("private: distance to the nearest training picture", fontsize=11)
    panels = ((copying.features, f"distance in features\n({copying.shown})"), (copying.pixels, "distance in pixels\n"))
    for axes, (of, name) in zip(figure.subplots(1, 2), panels, strict=True):
        axes.ecdf(of.samples, label=f"samples ({len(of.samples)})", color="tab:red")
        axes.ecdf(of.held_out, label=f"held-out pictures ({len(of.held_out)})", color="tab:blue")
        axes.axvline(of.usual, color="black", linestyle=":", linewidth=1, label=f"{QUANTILE:.0%} of held-out pictures")
        axes.set(xlabel=name, ylabel="share so near or nearer", xlim=(0, None))
        axes.legend(loc="lower right", fontsize=8)
    with whole_file(path, private=True) as temporary:
        FigureCanvasAgg(figure).print_png(temporary)


@private_names(PRIVATE_PICTURE)
def write_pairs(path: Path, copying: Copying, samples: Dataset, real: Dataset) -> None:
    """The samples that lie nearest to a training picture, each left of that picture, as one PNG file.

    In features or in pixels, whichever is nearer beside held-out pictures: a copy may look far off to one of them.
    It shows private pictures: only its owner may read the file; keep it out of shared folders.
    """
    both = np.stack([copying.features.relative, copying.pixels.relative])
    spaces, rows = both.argmin(axis=0), np.stack([copying.features.rows, copying.pixels.rows])
    chosen = np.argsort(both.min(axis=0), kind="stable")[:PAIRS]
    width, height = 2 * SIDE + GAP // 2, SIDE + 2 * LINE + GAP
    size = (GAP + COLUMNS * (width + 2 * GAP), HEAD + -(-len(chosen) // COLUMNS) * height)
    sheet = Image.new("RGB", size, "white")
    draw, letters = ImageDraw.Draw(sheet), font()
    lines = (
        "private: the samples (left) that lie nearest to a training picture (right)",
        f"below each: its distance over the one that {1 - QUANTILE:.0%} of held-out pictures keep",
    )
    for number, line in enumerate(lines):
        draw.text((GAP, GAP // 2 + number * LINE), line, "black", letters)
    for place, sample in enumerate(chosen):
        space = spaces[sample]
        left, top = GAP + place % COLUMNS * (width + 2 * GAP), HEAD + place // COLUMNS * height
        for beside, (dataset, row) in enumerate(((samples, sample), (real, rows[space, sample]))):
            sheet.paste(enlarged(dataset.images([int(row)])[0]), (left + beside * (SIDE + GAP // 2), top))
        text = f"{place + 1}: {both[space, sample]:.2f} in {('features', 'pixels')[space]}"
        draw.text((left, top + SIDE + 2), text, "black", letters)
    with whole_file(path, private=True) as temporary:
        sheet.save(temporary, format="PNG")
