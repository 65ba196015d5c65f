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
from dp_lora.evaluation.pictures import resized, utility_pictures, utility_size
from dp_lora.files import whole_file

NEAR = 0.05  # root mean square of the difference, as a share of the range from black to white
QUANTILE = 0.01  # of the held-out pictures' distances
PAIRS, COLUMNS = 10, 2
HEAD = 3 * LINE  # pixels above the pairs


@dataclass(frozen=True)
class Distances:
    """Distances to the nearest training picture: of samples, of held-out pictures, and of samples of the base."""

    samples: NDArray[np.float64]  # (n,)
    rows: NDArray[np.int64]  # (n,): the training picture that lies nearest to a sample
    held_out: NDArray[np.float64]  # (m,)
    base: NDArray[np.float64]  # (b,): without an adapter it never saw a private picture

    @cached_property
    def usual(self) -> float:
        """The distance that all but a hundredth of the held-out pictures reach or exceed."""
        return float(np.quantile(self.held_out, QUANTILE))

    @property
    def relative(self) -> NDArray[np.float64]:
        """The samples' distances divided by `usual`, (n,): below 1 is nearer than held-out pictures are."""
        return self.samples / max(self.usual, np.finfo(np.float64).tiny)

    def nearer(self, distances: NDArray[np.float64]) -> int:
        """Number of `distances` below `usual`."""
        return int((distances < self.usual).sum())


@dataclass(frozen=True)
class Copying:
    """Distances in features and in pixels (root mean square, 0 to 1), and how many samples equal a training picture."""

    features: Distances
    pixels: Distances
    exact: int
    shown: str  # the features, in words

    def scores(self) -> list[Measurement]:
        of = self.pixels
        what = f"whose pixels differ from a training picture's by {NEAR:g} of the range or less"
        near = {
            "": (of.samples, "samples"),
            "_held_out": (of.held_out, "held-out pictures"),
            "_base": (of.base, "samples of the base"),
        }
        return [
            _count("exact_copies", self.exact, f"of {len(of.samples)} samples: equal to a training picture"),
            *(
                _count(f"near_copies{ending}", int((found <= NEAR).sum()), f"of {len(found)} {whose}: {what}")
                for ending, (found, whose) in near.items()
            ),
            *_shares("nearer_than_held_out", self.features, self.shown),
            *_shares("nearer_than_held_out_pixels", self.pixels, "pixels"),
        ]


def _shares(name: str, of: Distances, shown: str) -> list[Measurement]:
    """The share of samples, and of the base's, that lie nearer than held-out pictures do."""
    limit = (
        f"nearer to a training picture than the {QUANTILE:.0%} quantile of {len(of.held_out)} held-out pictures "
        f"(about {QUANTILE:g} without copying); {shown}"
    )
    return [
        Measurement(
            name + ending,
            of.nearer(found) / len(found),
            f"share of {len(found)} {whose} {limit}",
            True,
            *share_interval(of.nearer(found), len(found)),
        )
        for ending, found, whose in (("", of.samples, "samples"), ("_base", of.base, "samples of the base"))
    ]


def _count(name: str, value: int, meaning: str) -> Measurement:
    return Measurement(name, value, meaning, private=True)


@private_names(PRIVATE_PICTURE)
def look_for_copies(features: FeatureSets, of_base: NDArray[np.uint8]) -> Copying:
    """Distance of every sample, held-out picture and sample of the base to its nearest training picture.

    `of_base`: samples (b, H, W, C) of the base without an adapter: uint8, of the samples' size. Pictures above 64
    pixels are compared at 64. Needs test pictures: they are the held-out ones.
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
    base = nearest(features.space.of([of_base], f"{features.space.shown}, base"), features.real, device)[0]
    in_features = Distances(*nearest(features.samples, features.real, device), held_out, base)
    samples, real = (_flat(dataset) for dataset in (sets.samples, sets.real))
    scale = 255 * np.sqrt(real.shape[1])
    held_out = sets.cache.array("pixels-nearest-test", facts, lambda: nearest(_flat(test), real, device)[0])
    distance, rows = nearest(samples, real, device)
    of_base = resized(of_base, utility_size(sets.real), sets.real.channels)
    base = nearest(of_base.reshape(len(of_base), -1), real, device)[0]
    in_pixels = Distances(distance / scale, rows, held_out / scale, base / scale)
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
    """A plot of the distributions: the share of samples, held-out pictures and base's samples so near or nearer."""
    figure = Figure(figsize=(11, 4.2), dpi=110, layout="constrained")
    figure.suptitle("private: distance to the nearest training picture", fontsize=11)
    panels = ((copying.features, f"distance in features\n({copying.shown})"), (copying.pixels, "distance in pixels\n"))
    for axes, (of, name) in zip(figure.subplots(1, 2), panels, strict=True):
        axes.ecdf(of.samples, label=f"samples ({len(of.samples)})", color="tab:red")
        axes.ecdf(of.held_out, label=f"held-out pictures ({len(of.held_out)})", color="tab:blue")
        axes.ecdf(of.base, label=f"samples of the base ({len(of.base)})", color="tab:gray", linestyle="--")
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
