"""PNG bytes, uint8 arrays and float tensors hold the same picture."""

import numpy as np
import pytest
import torch

from dp_lora.data.pixels import to_pixels, to_uint8
from dp_lora.data.png import decode_png, encode_png
from dp_lora.errors import InputError

CUT = encode_png(np.random.default_rng(0).integers(0, 256, (8, 8, 1), np.uint8))[:90]


@pytest.mark.parametrize("channels", [1, 3])
def test_every_grey_value_survives_tensor_and_png(channels: int) -> None:
    images = np.repeat(np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1), channels, axis=-1)
    pixels = to_pixels(images)
    assert pixels.shape == (1, channels, 16, 16)
    assert pixels.dtype == torch.float32
    assert (pixels.min().item(), pixels.max().item()) == (-1.0, 1.0)
    np.testing.assert_array_equal(to_uint8(pixels), images)
    np.testing.assert_array_equal(decode_png(encode_png(images[0]), 16, channels), images[0])


def test_channels_rows_and_columns_keep_their_places() -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 4, 5, 3), np.uint8)
    assert to_pixels(images)[1, 2, 3, 4].item() == pytest.approx(images[1, 3, 4, 2] / 127.5 - 1)


def test_values_out_of_range_are_clamped_and_nan_is_refused() -> None:
    pixels = torch.tensor([-7.0, 7.0, 0.0, 1.0]).reshape(1, 1, 2, 2)
    assert to_uint8(pixels).ravel().tolist() == [0, 255, 128, 255]
    pixels[0, 0, 0, 0] = float("nan")
    with pytest.raises(InputError, match="NaN"):
        to_uint8(pixels)


@pytest.mark.parametrize("png", [b"", b"not a png", CUT])
def test_other_bytes_are_a_value_error(png: bytes) -> None:
    with pytest.raises(ValueError, match=r"cannot identify|truncated"):
        decode_png(png, 8, 1)
