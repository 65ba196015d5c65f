"""EMNIST and MNIST through torchvision's classes and a server of the test's own, in the real files' layout."""

import gzip
import hashlib
import io
import struct
import zipfile
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import EMNIST, MNIST

from dp_lora.config import load
from dp_lora.data.layout import read_dataset
from dp_lora.files import digest_file, read_json
from tests.support.download_server import Server, serving
from tests.support.prepare_call import Project

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
TRAIN, TEST = 52, 26


def idx(array: np.ndarray) -> bytes:
    header = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    return gzip.compress(header + array.astype(np.uint8).tobytes())


def glyph(number: int) -> np.ndarray:
    """An L with its foot at the lower right, so a turned one differs, and a mark with the picture's number."""
    image = np.zeros((28, 28), np.uint8)
    image[4:24, 4:8] = 255
    image[20:24, 4:16] = 255
    image[6:10, 20:24] = 10 + number
    return image


def pictures(n: int) -> np.ndarray:
    return np.stack([glyph(number) for number in range(n)])


def emnist_zip(turned: bool = True, labels_from: int = 1) -> bytes:
    """gzip.zip with the letters alone; the real file has five more datasets."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for split, n in (("train", TRAIN), ("test", TEST)):
            images = pictures(n).transpose(0, 2, 1) if turned else pictures(n)
            file.writestr(f"gzip/emnist-letters-{split}-images-idx3-ubyte.gz", idx(images))
            labels = np.arange(n) % 26 + labels_from
            file.writestr(f"gzip/emnist-letters-{split}-labels-idx1-ubyte.gz", idx(labels))
    return buffer.getvalue()


def mnist_files() -> dict[str, bytes]:
    contents = [idx(pictures(TRAIN)), idx(np.arange(TRAIN) % 10), idx(pictures(TEST)), idx(np.arange(TEST) % 10)]
    return {f"/mnist/{name}": body for (name, _), body in zip(MNIST.resources, contents, strict=True)}


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as running:
        running.files |= {"/emnist/gzip.zip": emnist_zip(), **mnist_files()}
        yield running


def settings(server: Server, **changes: object) -> str:
    def md5(path: str) -> str:
        return hashlib.md5(server.files[path], usedforsecurity=False).hexdigest()

    mnist = ",".join(md5(f"/mnist/{name}") for name, _ in MNIST.resources)
    values: dict[str, object] = {
        "public.mirror": f"{server.url}/emnist",
        "public.mirror_md5": f"[{md5('/emnist/gzip.zip')}]",
        "public.n": TRAIN,
        "data.mirror": f"{server.url}/mnist/",
        "data.mirror_md5": f"[{mnist}]",
    }
    return " ".join(f"{key}={value}" for key, value in (values | changes).items())


def test_letters_are_upright_and_have_their_own_class(project: Project, server: Server):
    result = project.prepare("emnist", settings(server))
    assert result.exit_code == 0, result.output
    assert "images/s" in result.stderr
    # it names copies of private digits alone: the letters are public
    assert result.stderr.count("identical pictures: ") == 1
    assert f"{2 * TEST} pictures in {TEST} groups (0 in training, {TEST} across the split, " in result.stderr
    assert project.shown() == ["emnist", "mnist"]
    for split, n in (("train", TRAIN), ("test", TEST)):
        dataset = read_dataset(project.root / "data/emnist", list(LETTERS), split)
        images = dataset.images(slice(None))
        assert images.shape == (n, 32, 32, 3)
        for number in range(n):
            expected = np.asarray(Image.fromarray(glyph(number)).resize((32, 32), Image.Resampling.BILINEAR))
            # an L on its side, or another picture's label, would differ
            assert (images[number] == expected[..., None]).all()
            assert dataset.labels[number] == number % 26
    digits = read_dataset(project.root / "data/mnist", list("0123456789"), "train")
    assert digits.images([3]).shape == (1, 32, 32, 3)
    assert (digits.images([3])[0, 5:20, 6, 0] == 255).all()  # MNIST's own files are upright
    assert digits.labels.tolist() == [number % 10 for number in range(TRAIN)]
    assert project.commits == [("commit", "--force", "data.dvc")]


@pytest.mark.slow
def test_source_json_names_origin_address_and_counts_and_a_second_call_asks_nobody(project: Project, server: Server):
    assert project.prepare("emnist", settings(server)).exit_code == 0
    source = read_json(project.root / "data/emnist/source.json")
    assert "EMNIST" in source["origin"]
    assert (source["url"], source["counts"]) == (f"{server.url}/emnist/", {"train": TRAIN, "test": TEST})
    assert source["sha256"] == digest_file(project.root / "data/emnist/images.parquet")
    server.requests.clear()
    assert project.prepare("emnist", settings(server)).exit_code == 0
    assert not server.requests


@pytest.mark.parametrize("name", ["emnist", "mnist"])
def test_without_sums_of_its_own_a_mirror_must_have_the_real_files(project: Project, server: Server, name: str):
    section = "public" if name == "emnist" else "data"
    line = project.refused(
        "emnist", settings(server, **{f"{section}.mirror_md5": "null"}), server.url, f"{section}.mirror"
    )
    assert "corrupted" in line
    assert name not in project.shown()


@pytest.mark.slow
def test_a_missing_file_a_damaged_archive_and_another_number_are_one_line(project: Project, server: Server):
    project.refused(
        "emnist", settings(server, **{"data.mirror": f"{server.url}/none/"}), "mnist: ", "404", "data.mirror"
    )
    project.refused("emnist", settings(server, **{"data.mirror_md5": f"[{'f' * 32}]"}), "mirror_md5: 1 sums", "4 files")
    project.refused("emnist", settings(server, **{"public.n": 51}), "public.n=51", "52 training pictures")
    name = "/mnist/train-images-idx3-ubyte.gz"
    whole, server.files[name] = server.files[name], server.files[name][:300]
    project.refused("emnist", settings(server), "mnist", "data.mirror")
    server.files[name] = whole
    server.files["/emnist/gzip.zip"] = emnist_zip(labels_from=2)
    project.refused("emnist", settings(server), "train row 25", "label 26 is none of A to Z")
    server.files["/emnist/gzip.zip"] = emnist_zip()[:800]
    project.refused("emnist", settings(server), "emnist", "zip")


def test_the_real_files_are_those_that_torchvision_knows():
    from dp_lora.data.torchvision_sets import addresses

    assert addresses("emnist", None)[0] + "gzip.zip" == EMNIST.url
    assert addresses("mnist", None) == MNIST.mirrors
    config = load("emnist")
    assert (config.public.mirror, config.data.mirror_md5, config.public.n, config.data.n_public) == (
        None,
        None,
        124800,
        60000,
    )
