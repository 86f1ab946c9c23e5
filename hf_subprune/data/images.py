"""Pictures of any mode or shape, as an image processor takes them."""

from typing import Any

import numpy as np
import torch
from transformers.image_utils import is_pil_image

_MODES = {1: "L", 3: "RGB"}


def is_picture(value: Any) -> bool:
    """Whether a value is an image: of PIL, or an array of two or three dimensions."""
    return is_pil_image(value) or (isinstance(value, (np.ndarray, torch.Tensor)) and value.ndim in (2, 3))


def as_picture(value: Any, channels: int) -> Any:
    """A picture with the channels that a model takes.

    Args:
        value: A PIL image of any mode; or an array or tensor `(height, width)`, `(height, width, c)` or
            `(c, height, width)`. Whole numbers are brightness up to the largest of their type, floats are left as they
            are but for their channels.
        channels: Of the model: 1 is greyscale, 3 is RGB; another number is left to the image processor.

    Returns:
        A PIL image, or an array of floats.
    """
    if channels not in _MODES:
        return value
    from PIL import Image  # who has pictures has it, others may not

    if not is_pil_image(value):
        value = _last_channel(np.asarray(value))
        if value.dtype.kind == "f":
            return _with_channels(value, channels)
        value = Image.fromarray(_eight_bits(value).squeeze(-1) if value.shape[-1] == 1 else _eight_bits(value))
    elif value.mode.startswith("I") or value.mode == "F":  # PIL would clip these at 255
        value = Image.fromarray(_eight_bits(np.asarray(value)))
    return value.convert(_MODES[channels])


def _last_channel(array: np.ndarray) -> np.ndarray:
    """`(height, width, channels)`: the channels are an axis of at most four entries, the last one if in doubt."""
    if array.ndim == 2:
        return array[..., None]
    return np.moveaxis(array, 0, -1) if array.shape[-1] > 4 >= array.shape[0] else array


def _eight_bits(array: np.ndarray) -> np.ndarray:
    """Brightness up to 255."""
    if array.dtype == np.uint8:
        return array
    if array.dtype == bool:
        return array.astype(np.uint8) * 255
    largest = float(array.max(initial=0))
    if array.dtype.kind == "f":
        scale = 255 if largest <= 1 else 1 if largest <= 255 else 255 / largest
    else:
        scale = 1 if largest <= 255 and array.dtype != np.uint16 else 255 / max(65535, largest)
    return (array * scale).clip(0, 255).astype(np.uint8)


def _with_channels(array: np.ndarray, channels: int) -> np.ndarray:
    """The mean of colours for grey, grey three times for colours; a last channel of opacity goes."""
    array = array[..., :3] if array.shape[-1] == 4 else array[..., :1] if array.shape[-1] == 2 else array
    if array.shape[-1] == channels:
        return array
    return array.mean(-1, keepdims=True) if channels == 1 else array.repeat(channels, -1)
