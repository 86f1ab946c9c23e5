"""Memory that a run takes, how it gives it back, and errors that are of the machine that it runs on."""

import ctypes
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch
from accelerate.utils.memory import should_reduce_batch_size

# Of glibc; other C libraries give memory back by themselves, or not at all.
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None
_trim, _mallopt = getattr(_libc, "malloc_trim", None), getattr(_libc, "mallopt", None)

# Pieces of this size and more are pages of their own: by default, after large ones have been freed, and in `reused`.
_MMAP_THRESHOLD, _FIRST, _GROWN, _REUSED = -3, 128 * 2**10, 32 * 2**20, 64 * 2**20
# So much may be free at the end of the heap: after large pieces have been freed, and in `reused`.
_TRIM_THRESHOLD, _USUAL, _ANY = -1, 64 * 2**20, 2**31 - 1


_DEVICE_ERROR = getattr(torch, "AcceleratorError", ())  # of torch 2.8
_OF_DEVICES = re.compile(
    r"(CUDA|cuda|HIP|MPS|XPU|NCCL|cuDNN|CUDNN|cuBLAS|CUBLAS|cuSOLVER|CUSOLVER)\w*( runtime)? (error|driver|backend)"
    r"|_STATUS_|out of memory|enough memory|allocate|[aA]llocation failed|device-side"
)


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether smaller batches may do."""
    return isinstance(error, MemoryError) or should_reduce_batch_size(error)


def is_of_the_machine(error: BaseException) -> bool:
    """Whether an error is one of memory, a device or a file, and so says nothing of what a model computes."""
    if ran_out_of_memory(error) or isinstance(error, (OSError, _DEVICE_ERROR)):
        return True
    return isinstance(error, RuntimeError) and _OF_DEVICES.search(str(error)) is not None


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


@contextmanager
def reused() -> Iterator[None]:
    """Tensors of up to 64 MiB leave their memory to the next ones when they are freed.

    Left to itself, the C library gives much of it back to the system, which clears each page that it hands out: a
    tenth of the time of pruning a language model of 135 M. `release_memory` gives back what is left in the end.
    """
    if _mallopt is not None:
        _mallopt(_MMAP_THRESHOLD, _REUSED) or _mallopt(_MMAP_THRESHOLD, _GROWN)  # the most that older ones accept
        _mallopt(_TRIM_THRESHOLD, _ANY)
    try:
        yield
    finally:
        if _mallopt is not None:
            _mallopt(_MMAP_THRESHOLD, _GROWN)
            _mallopt(_TRIM_THRESHOLD, _USUAL)
        release_memory()


def peak_memory() -> int:
    """Largest resident size of this process so far, bytes."""
    held = psutil.Process().memory_info()
    if hasattr(held, "peak_wset"):  # on Windows
        return held.peak_wset
    import resource  # which Windows has not

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
