"""Sound as people have it, in files or as arrays of any rate and number of channels, to the waveform of a model."""

from __future__ import annotations

import io
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Audio, Dataset, IterableDataset

SOUND_KINDS = frozenset({".wav", ".flac", ".mp3", ".ogg", ".opus", ".aiff", ".aif", ".au", ".w64", ".caf"})
"""Suffixes of the files that `soundfile` reads."""

_EXTRA = "pip install 'hf_subprune[speech]'"


def is_stored(value: Any) -> bool:
    """Whether a value is sound as `datasets` has it: a dict of `array`, of `bytes` or of `path`, or its decoder."""
    if isinstance(value, Mapping):
        return not {"array", "bytes", "path"}.isdisjoint(value)
    return hasattr(value, "get_all_samples")


def is_file(value: Any) -> bool:
    """Whether a value is the path of a sound file, or the bytes of one."""
    if isinstance(value, (str, Path)):
        return Path(value).suffix.lower() in SOUND_KINDS
    return isinstance(value, (bytes, bytearray))


def is_waveform(value: Any) -> bool:
    """Whether a value is a list or an array of floats."""
    if isinstance(value, (np.ndarray, torch.Tensor)):
        return value.ndim == 1 and "float" in str(value.dtype)
    return isinstance(value, list) and bool(value) and isinstance(value[0], float)


def waveform(value: Any, rate: int) -> np.ndarray | None:
    """A sound as `(values,)` float32 at a rate, its channels mixed down; `None` where the value is missing.

    Args:
        value: As `is_stored`, `is_file` or `is_waveform` says. Whole numbers are as loud as the largest of their type;
            an array without a rate is taken to be at `rate`.
        rate: Values a second.

    Raises:
        ImportError: a package of the extra `speech` is missing.
        ValueError: the sound is empty, or holds NaN or inf, or has more than two dimensions.
        OSError, RuntimeError: the file is not there, or cannot be read.
    """
    if hasattr(value, "get_all_samples"):
        value = {name: value[name] for name in ("array", "sampling_rate")}  # so `datasets` lets its decoder be read
    elif is_waveform(value):
        value = {"array": value}
    elif not isinstance(value, Mapping):
        value = {"path": value} if isinstance(value, (str, Path)) else {"bytes": value}
    array, given = value.get("array"), value.get("sampling_rate")
    if array is None:
        source = value.get("path") if value.get("bytes") is None else value["bytes"]
        if source is None:
            return None
        array, given = _read(source)
    return _resampled(_mono(_floats(np.asarray(array))), given or rate, rate)


class _Stored(Audio):
    """Sound as `datasets` finds it: its own feature asks for torchcodec even where it decodes nothing."""

    def encode_example(self, value: Any) -> Any:
        return value


def undecoded(data: Any) -> Any:
    """A data set of `datasets` whose sounds come as they are stored, to be read by `waveform`.

    `datasets` itself decodes with torchcodec, which is often not there. It does so where `soundfile` is missing.
    """
    if not isinstance(data, (Dataset, IterableDataset)) or (find_spec("torchcodec") and not find_spec("soundfile")):
        return data
    for name, feature in (data.features or {}).items():
        if isinstance(feature, Audio) and not isinstance(feature, _Stored):
            data = data.cast_column(name, _Stored(decode=False))
    return data


def _read(source: Any) -> tuple[np.ndarray, int]:
    """`(values, channels)` and the rate, from the path of a file or its bytes."""
    try:
        import soundfile
    except ImportError as error:
        raise ImportError(f"Sound files are read by soundfile: {_EXTRA}") from error
    file: Any = io.BytesIO(source) if isinstance(source, (bytes, bytearray)) else str(source)
    if isinstance(file, str) and "://" in file:
        import fsspec  # `datasets` has it, and gives paths of the Hub in its notation

        with fsspec.open(file, "rb") as opened:
            file = io.BytesIO(opened.read())
    elif isinstance(file, str):
        file = Path(file).expanduser()
        if not file.is_file():
            raise FileNotFoundError(f"There is no sound file {file}.")
    return soundfile.read(file, dtype="float32", always_2d=True)


def _floats(array: np.ndarray) -> np.ndarray:
    """Between -1 and 1, where whole numbers were stored."""
    if array.dtype.kind not in "iu":
        return array.astype(np.float32, copy=False)
    half = 2.0 ** (8 * array.itemsize - 1)
    return (array / half - (array.dtype.kind == "u")).astype(np.float32)


def _mono(array: np.ndarray) -> np.ndarray:
    """`(values,)`: the mean over channels, which are fewer than values, along whichever dimension."""
    if array.ndim > 2 or array.size == 0:
        raise ValueError(f"A sound must be values, or values by channels, found an array of shape {array.shape}.")
    if array.ndim == 2:
        array = array.mean(int(np.argmin(array.shape)))
    if not np.isfinite(array).all():
        raise ValueError("A sound holds NaN or inf.")
    return array


def _resampled(array: np.ndarray, given: int, rate: int) -> np.ndarray:
    if given == rate:
        return array
    try:
        import soxr
    except ImportError as error:
        raise ImportError(
            f"The sound has {given} values a second, the model takes {rate}, and soxr is missing: {_EXTRA}"
        ) from error
    return soxr.resample(array, given, rate)
