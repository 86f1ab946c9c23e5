"""How a run copes with its device: products in full precision, memory given back, smaller batches where it ends."""

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from accelerate.utils import find_executable_batch_size
from transformers.utils import logging

from .calibration import CalibrationSet, is_divisible

logger = logging.get_logger(__name__)

_T = TypeVar("_T")

# Of glibc; other C libraries give memory back by themselves, or not at all.
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None
_trim, _mallopt = getattr(_libc, "malloc_trim", None), getattr(_libc, "mallopt", None)

# Pieces of this size and more are pages of their own: by default, and after large ones have been freed.
_MMAP_THRESHOLD, _FIRST, _GROWN = -3, 128 * 2**10, 32 * 2**20


@contextmanager
def full_precision() -> Iterator[None]:
    """Products of float32 matrices are float32 inside: TF32 changes which units are kept."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def release_memory() -> None:
    """Give the system back what was freed: the C library keeps it between pieces in use, more of it layer by layer."""
    if _trim is not None:
        _trim(0)


@contextmanager
def freed_at_once() -> Iterator[None]:
    """Large tensors go back to the system when they are freed, whatever was allocated in between.

    The C library raises the size from which this is so to that of the largest piece freed, up to 32 MiB. What lies
    between smaller ones then keeps memory, more of it layer by layer, that `release_memory` cannot give back in the
    middle of a layer. It takes more of the system's time.
    """
    if _mallopt is not None:
        _mallopt(_MMAP_THRESHOLD, _FIRST)
    try:
        yield
    finally:
        if _mallopt is not None:
            _mallopt(_MMAP_THRESHOLD, _GROWN)


def with_fitting_batches(calibration: CalibrationSet, run: Callable[[CalibrationSet, int], _T]) -> _T:
    """What `run` returns, called again with batches of half the size whenever memory runs out.

    Args:
        calibration: The batches to begin with.
        run: Takes batches, and how many samples they have at most; what it changed is undone when it fails.

    Raises:
        RuntimeError: there is no memory for a single sample.
    """
    batches = [*calibration.fit, *calibration.held_out]
    size = max((len(next(iter(batch.values()))) for batch in batches if is_divisible(batch)), default=1)

    def halve() -> int:
        nonlocal size
        size //= 2
        if size:
            logger.warning(f"Out of memory: going on with batches of at most {size} samples.")
        return size

    @find_executable_batch_size(starting_batch_size=size, reduce_batch_size_fn=halve)
    def attempt(batch_size: int) -> _T:
        return run(calibration.in_batches_of(batch_size), batch_size)

    return attempt()
