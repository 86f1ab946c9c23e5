"""How a run copes with its device: products in full precision, memory given back, smaller batches where it ends."""

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from accelerate.utils import find_executable_batch_size
from accelerate.utils.memory import should_reduce_batch_size
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
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


# Instructions of x86 processors for products of half precision, without which PyTorch has slow ones.
_INSTRUCTIONS = {
    torch.bfloat16: ("avx512_bf16", "amx_bf16", "avx10_2"),
    torch.float16: ("avx512_fp16", "amx_fp16", "avx10_2"),
}
# Numbers of a weight that are widened at a time.
_AT_ONCE = 1 << 24

_as_deployed = ContextVar("as_deployed", default=False)


def is_slow(dtype: torch.dtype) -> bool:
    """Whether products of this dtype are slower than those of float32 on this machine's CPU."""
    capabilities: Any = getattr(torch.cpu, "get_capabilities", dict)()
    if dtype not in _INSTRUCTIONS or capabilities.get("architecture") != "x86_64":
        return False
    return not any(capabilities.get(name, False) for name in _INSTRUCTIONS[dtype])


@contextmanager
def fast_products(model: nn.Module) -> Iterator[None]:
    """Linears of half precision run in float32 inside, on CPUs that have no instructions for anything less.

    They are several times as fast, and their outputs are rounded to what they are rounded to otherwise.
    """
    if not any(is_slow(dtype) for dtype in {p.dtype for p in model.parameters() if p.device.type in ("cpu", "meta")}):
        yield
        return
    with _LinearsInFloat32():
        yield


@contextmanager
def as_deployed() -> Iterator[None]:
    """Linears run as they do without `fast_products`, to be timed."""
    token = _as_deployed.set(True)
    try:
        yield
    finally:
        _as_deployed.reset(token)


class _LinearsInFloat32(TorchFunctionMode):
    """See `fast_products`."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is functional.linear and not _as_deployed.get():
            return _linear(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    if input.device.type != "cpu" or not is_slow(input.dtype):
        return functional.linear(input, weight, bias)
    wide, rows = input.float(), max(1, _AT_ONCE // weight.shape[1])
    starts = range(0, len(weight), rows)  # a few rows at a time: in float32 all of them take twice the memory
    parts = [
        functional.linear(wide, weight[i : i + rows].float(), None if bias is None else bias[i : i + rows].float()).to(
            input.dtype
        )
        for i in starts
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


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

    def attempt(batch_size: int) -> _T:
        return run(calibration.in_batches_of(batch_size), batch_size)

    try:
        return attempt(size)
    except RuntimeError as failure:
        if not should_reduce_batch_size(failure):
            raise
    # Not before: it collects garbage first, which takes as long as pruning a block of a small model.
    return find_executable_batch_size(attempt, halve(), halve)()
