"""The precision that products are computed in, whatever the weights are stored in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


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
def fast_products(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Linears of half precision run in float32 inside, on CPUs that have no instructions for anything less.

    They are several times as fast, and their outputs are rounded to what they are rounded to otherwise.

    Args:
        parameters: Of the model; nothing is done where none of them is slow.
    """
    if not any(is_slow(dtype) for dtype in {p.dtype for p in parameters if p.device.type in ("cpu", "meta")}):
        yield
        return
    with _LinearsInFloat32():
        yield


@contextmanager
def precise_products(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """`full_precision`, and `fast_products` for a model of these parameters."""
    with full_precision(), fast_products(parameters):
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
    wide, rows = input.float(), max(1, _AT_ONCE // max(1, weight.shape[1]))
    starts = range(0, len(weight), rows)  # a few rows at a time: in float32 all of them take twice the memory
    parts = [
        functional.linear(wide, weight[i : i + rows].float(), None if bias is None else bias[i : i + rows].float()).to(
            input.dtype
        )
        for i in starts
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


HALVES = (torch.float16, torch.bfloat16)


class WideConvolutions(TorchFunctionMode):
    """Convolutions compare the dtypes of what they are given before they become operations of the other mode.

    Args:
        dtype: As of `Wide`.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in _CONVOLUTIONS:
            args, kwargs = _widened(args, self.dtype), _widened(kwargs or {}, self.dtype)
        return func(*args, **(kwargs or {}))


_CONVOLUTIONS = (
    *(functional.conv1d, functional.conv2d, functional.conv3d),
    *(functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d),
)


class Wide(TorchDispatchMode):
    """Every operation on floating tensors of a narrower dtype is carried out in this one, and nothing stored in less.

    Args:
        dtype: float32 or float64.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return func(*_widened(args, self.dtype), **_widened(kwargs or {}, self.dtype))


def _widened(value: Any, dtype: torch.dtype) -> Any:
    narrow = HALVES if dtype == torch.float32 else (*HALVES, torch.float32)
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.dtype in narrow else value
    if isinstance(value, dict):
        return {name: _widened(one, dtype) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_widened(one, dtype) for one in value)
    return dtype if isinstance(value, torch.dtype) and value in narrow else value
