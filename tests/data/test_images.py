import numpy as np
import pytest
import torch
from PIL import Image

from hf_subprune.data.images import as_picture

PIXELS = np.random.default_rng(0).integers(0, 255, (24, 20, 4), dtype=np.uint8)


def same(found, expected):
    return np.array_equal(np.asarray(found), np.asarray(expected))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kept", [slice(0, 1), slice(0, 3), slice(0, 4)])
def test_arrays_are_the_pictures_that_they_hold(channels, kept):
    array = PIXELS[..., kept].squeeze()
    expected = Image.fromarray(array).convert("L" if channels == 1 else "RGB")
    assert same(as_picture(array, channels), expected)
    assert same(as_picture(PIXELS[..., kept], channels), expected)
    assert same(as_picture(torch.from_numpy(PIXELS[..., kept]).movedim(-1, 0), channels), expected)
    assert same(as_picture(Image.fromarray(array), channels), expected)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_bright_pictures_are_not_clipped(dtype):
    deep = PIXELS[..., 0].astype(dtype) * 257
    for given in (deep, Image.fromarray(deep)):
        assert same(as_picture(given, 3), Image.fromarray(PIXELS[..., 0]).convert("RGB"))


@pytest.mark.parametrize(("shape", "channels"), [((24, 20), 3), ((24, 20, 4), 3), ((3, 24, 20), 3), ((24, 20, 3), 1)])
def test_floats_keep_their_values(shape, channels):
    given = np.random.default_rng(0).random(shape)
    found = as_picture(given, channels)
    assert found.shape == (24, 20, channels) and found.dtype == given.dtype
    assert found.min() > 0 and found.max() < 1


def test_other_numbers_of_channels_are_left_to_the_processor():
    given = np.zeros((24, 20, 6))
    assert as_picture(given, 6) is given
