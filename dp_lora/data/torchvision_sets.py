"""EMNIST letters and MNIST digits at full size, downloaded by torchvision's classes, which know addresses and MD5."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from dp_lora.config.schema import Data, Public
from dp_lora.data.layout import Picture
from dp_lora.data.png import encode_png
from dp_lora.data.versioned import check_space, gigabytes
from dp_lora.errors import InputError
from dp_lora.events import Events

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
DIGITS = "0123456789"
CLASSES = {"emnist": LETTERS, "mnist": DIGITS}
# bytes: of the download, and of its unpacked files while the pictures are made
DOWNLOAD = {"emnist": 562_000_000, "mnist": 12_000_000}
UNPACKED = {"emnist": 2_400_000_000, "mnist": 55_000_000}
SOURCES = {
    "emnist": {
        "origin": "EMNIST letters (G. Cohen, S. Afshar, J. Tapson, A. van Schaik; NIST Special Database 19)",
        "licence": "NIST: public domain",
    },
    "mnist": {"origin": "MNIST (Y. LeCun, C. Cortes, C. J. C. Burges)", "licence": "CC BY-SA 3.0"},
}


def addresses(name: str, mirror: str | None) -> list[str]:
    """Addresses of the folders with the files of `name` (emnist, mnist): torchvision's own, or the mirror."""
    from torchvision.datasets import EMNIST, MNIST

    if mirror is not None:
        return [mirror.rstrip("/") + "/"]
    return [EMNIST.url.rpartition("/")[0] + "/"] if name == "emnist" else list(MNIST.mirrors)


def digit_pictures(section: Public | Data, raw: Path, events: Events) -> Iterator[Picture]:
    """Pictures of emnist (A to Z) or mnist (0 to 9) with their published split; white on black, upright.

    28 pixels become section.size by bilinear interpolation, without a frame around them. The files are downloaded to
    the folder `raw`; archives of an earlier call stay where their MD5 is right. Raises InputError, one line, where the
    download fails or brings other files.
    """
    name, classes, known = section.source, list(section.classes), CLASSES[section.source]
    for label in classes:
        if label not in list(known):
            raise InputError(f"{label!r} is no class of {name}; it has {known[0]} to {known[-1]}")
    # a killed call leaves half-unpacked files, which torchvision would take for whole ones
    for path in [path for path in raw.rglob("*") if path.is_file() and path.suffix not in (".zip", ".gz")]:
        path.unlink()
    _say_space(section, raw, events)
    return _pictures(section, raw)


def _pictures(section: Public | Data, raw: Path) -> Iterator[Picture]:
    name, classes, known = section.source, list(section.classes), CLASSES[section.source]
    for split in ("train", "test"):
        images, labels = _load(section, split == "train", raw)
        for row, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
            if not 0 <= label < len(known):
                raise InputError(f"{name}, {split} row {row}: label {label} is none of {known[0]} to {known[-1]}")
            if known[label] in classes:
                resized = Image.fromarray(image).resize((section.size, section.size), Image.Resampling.BILINEAR)
                png = encode_png(np.repeat(np.asarray(resized)[..., None], section.channels, axis=-1))
                yield Picture(f"{split}-{row:06d}-{known[label]}.png", known[label], split, png)


def _say_space(section: Public | Data, raw: Path, events: Events) -> None:
    name, own = section.source, section.mirror_md5 is None
    # a mirror's own files are of unknown size
    free = check_space(raw, DOWNLOAD[name] + UNPACKED[name] if own else 0)
    sizes = f"{gigabytes(DOWNLOAD[name])} to download, {gigabytes(UNPACKED[name])} more until the pictures are made; "
    place = addresses(name, section.mirror)[0]
    events.message(f"{name} from {place}: {sizes if own else ''}{gigabytes(free)} free on this disk")


def _load(section: Public | Data, train: bool, raw: Path) -> tuple[np.ndarray, np.ndarray]:
    """uint8 (n, 28, 28), upright, and int64 (n,): positions in CLASSES[section.source]."""
    from torchvision.datasets import EMNIST, MNIST

    name, places = section.source, addresses(section.source, section.mirror)
    own = [EMNIST.md5] if name == "emnist" else [md5 for _, md5 in MNIST.resources]
    sums = own if section.mirror_md5 is None else list(section.mirror_md5)
    if len(sums) != len(own):
        raise InputError(f"mirror_md5: {len(sums)} sums; {name} has {len(own)} files")

    files = [(file, md5) for (file, _), md5 in zip(MNIST.resources, sums, strict=name == "mnist")]

    class Letters(EMNIST):
        url = f"{places[0]}gzip.zip"
        md5 = sums[0]

    class Digits(MNIST):
        mirrors = places
        resources = files

    try:
        if name == "emnist":
            found: MNIST = Letters(raw, split="letters", train=train, download=True)
            # pictures are stored by columns, as in the MATLAB original; labels count from 1
            images, labels = found.data.transpose(1, 2), found.targets - 1
        else:
            found = Digits(raw, train=train, download=True)
            images, labels = found.data, found.targets
        pixels, positions = images.contiguous().numpy(), labels.numpy().astype(np.int64)
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or len(pixels) != len(positions):
            raise ValueError(f"pictures {pixels.dtype} {pixels.shape}, labels {positions.shape}")
    # torchvision raises almost any exception for a server that is down, a wrong MD5, a damaged archive or idx file
    except Exception as error:
        cause = " ".join(str(error).split()) or type(error).__name__
        key = "public.mirror" if name == "emnist" else "data.mirror"
        raise InputError(f"{name}: {cause.rstrip('.')} ({', '.join(places)}); call again, or name a {key}") from None
    return pixels, positions
