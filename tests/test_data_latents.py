import math
import shutil

import numpy as np
import pytest
import torch

import dp_lora.data.latents as latents_module
from dp_lora import sources
from dp_lora.config import ROOT
from dp_lora.data.latents import encode_dataset
from dp_lora.data.layout import read_dataset
from dp_lora.data.pixels import to_pixels
from dp_lora.errors import InputError
from dp_lora.events import Events
from dp_lora.models.autoencoder import encode
from tests.support.tiny import tiny_config, tiny_dataset, tiny_model

CLASSES = tiny_config().data.classes


@pytest.fixture
def vae(tmp_path):
    return tiny_model(tmp_path).vae


@pytest.fixture
def dataset(tmp_path):
    tiny_dataset(tmp_path / "data")
    return read_dataset(tmp_path / "data", CLASSES, "train")


def calls_of_encode(monkeypatch, fail_at: int | None = None) -> list[int]:
    calls: list[int] = []

    def counted(vae, pixels):
        if fail_at is not None and len(calls) == fail_at:
            raise KeyboardInterrupt
        calls.append(len(pixels))
        return encode(vae, pixels)

    monkeypatch.setattr(latents_module, "encode", counted)
    return calls


def test_latents_are_the_normalised_means_in_the_order_of_the_dataset(dataset, vae, tmp_path):
    found = encode_dataset(dataset, vae, tmp_path / "cache", "cpu", 5, Events())
    assert isinstance(found, np.memmap)
    assert found.dtype == np.float32
    with torch.inference_mode():
        expected = encode(vae, to_pixels(dataset.images(slice(None)))).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)
    with pytest.raises(ValueError, match="read-only"):
        found[0] = 0
    (kept,) = (tmp_path / "cache").glob("*.npy")
    assert (kept.stat().st_mode & 0o777, kept.parent.stat().st_mode & 0o777) == (0o600, 0o700)


def test_a_second_call_reads_the_cache_and_another_autoencoder_or_dataset_does_not(dataset, vae, tmp_path, monkeypatch):
    calls = calls_of_encode(monkeypatch)
    first = encode_dataset(dataset, vae, tmp_path / "cache", "cpu", 8, Events())
    assert sum(calls) == len(dataset)
    again = encode_dataset(dataset, vae, tmp_path / "cache", "cpu", 3, Events())
    assert sum(calls) == len(dataset)
    assert np.array_equal(first, again)
    vae.register_to_config(latents_std=[2.0, 2.0])
    scaled = encode_dataset(dataset, vae, tmp_path / "cache", "cpu", 8, Events())
    assert sum(calls) == 2 * len(dataset)
    np.testing.assert_allclose(scaled, first / 2, atol=1e-5)
    tiny_dataset(tmp_path / "other", seed=1)
    encode_dataset(read_dataset(tmp_path / "other", CLASSES, "train"), vae, tmp_path / "cache", "cpu", 8, Events())
    assert sum(calls) == 3 * len(dataset)


def test_latents_of_other_code_or_another_library_are_not_read_back(dataset, vae, tmp_path, monkeypatch):
    calls = calls_of_encode(monkeypatch)
    package = tmp_path / "dp_lora"
    shutil.copytree(ROOT / "dp_lora", package)
    monkeypatch.setattr(sources, "PACKAGE", package)

    def encoded() -> int:
        calls.clear()
        encode_dataset(dataset, vae, tmp_path / "cache", "cpu", 8, Events())
        return sum(calls)

    assert (encoded(), encoded()) == (len(dataset), 0)
    for source in ("data/latents.py", "data/layout.py", "data/pixels.py", "data/png.py", "models/autoencoder.py"):
        with (package / source).open("a") as file:
            file.write("# changed\n")
        assert (encoded(), encoded()) == (len(dataset), 0), source
    monkeypatch.setattr(latents_module, "version", lambda name: f"another {name}")
    assert (encoded(), encoded()) == (len(dataset), 0)


def test_an_interrupted_encoding_goes_on_from_its_record_to_the_same_bits(dataset, vae, tmp_path, monkeypatch):
    whole = encode_dataset(dataset, vae, tmp_path / "whole", "cpu", 4, Events())
    monkeypatch.setattr(latents_module, "RECORD_EVERY", 2)
    calls_of_encode(monkeypatch, fail_at=5)
    with pytest.raises(KeyboardInterrupt):
        encode_dataset(dataset, vae, tmp_path / "cache", "cpu", 4, Events())
    assert len(list((tmp_path / "cache").glob("*.part.npy"))) == 1
    rest = calls_of_encode(monkeypatch)
    found = encode_dataset(dataset, vae, tmp_path / "cache", "cpu", 4, Events())
    assert sum(rest) == len(dataset) - 16
    assert np.array_equal(found, whole)
    assert not list((tmp_path / "cache").glob("*.part*"))


def test_latents_that_are_not_finite_are_refused_and_leave_no_cache(dataset, vae, tmp_path):
    with torch.no_grad():
        vae.quant_conv.bias.fill_(float("nan"))
    with pytest.raises(InputError, match="NaN"):
        encode_dataset(dataset, vae, tmp_path / "cache", "cpu", 8, Events())
    assert not [path for path in (tmp_path / "cache").glob("*.npy") if ".part" not in path.name]


@pytest.mark.parametrize("values", [1, 3 * 16 * 16, 10**9])
def test_no_more_pixel_values_are_encoded_at_once_than_is_said_whatever_the_batch_size(
    dataset, vae, tmp_path, monkeypatch, values
):
    calls = calls_of_encode(monkeypatch)
    monkeypatch.setattr(latents_module, "ENCODE_VALUES", values)
    encode_dataset(dataset, vae, tmp_path / "cache", "cpu", 20, Events())
    at_once = min(20, max(1, values // (16 * 16)))  # at least one picture, even if it is over the limit
    # the last batch is as large: if one picture joined, another shape would round the latents of others differently
    assert calls == [at_once] * math.ceil(len(dataset) / at_once)
