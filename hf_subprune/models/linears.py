"""Layers that map features linearly: `nn.Linear`, `Conv1D` and convolutions, each as one matrix on rows of inputs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from .offload import values

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)
PATCH_ENTRIES = 2**24
"""Entries of the patches that are in memory at a time."""


def is_linear(module: nn.Module) -> bool:
    """Whether every output feature of `module` is a linear function of all input features, near a position.

    These are `nn.Linear`, `Conv1D` and ungrouped `nn.Conv1d` and `nn.Conv2d` that hold their own floating weight (not
    one that is computed from others, as under weight normalisation).
    """
    weight = module._parameters.get("weight")
    if weight is None or not weight.is_floating_point():
        return False
    if isinstance(module, CONVOLUTIONS):
        return module.groups == 1
    return isinstance(module, (nn.Linear, Conv1D)) and weight.ndim == 2


def is_convolution(module: nn.Module) -> bool:
    """Whether `module` is a convolution, whose features are channels."""
    return isinstance(module, CONVOLUTIONS)


def feature_axis(module: nn.Module) -> int:
    """Axis of the features in the inputs and outputs of a linear, counted from the last: -1 but for convolutions."""
    return -1 - len(module.kernel_size) if isinstance(module, CONVOLUTIONS) else -1


def input_dim(module: nn.Module) -> int:
    """Dimension of a linear's weight along which its inputs lie; its outputs lie along the other one of 0 and 1."""
    return 0 if isinstance(module, Conv1D) else 1


def taps(module: nn.Module) -> int:
    """Entries of the kernel: columns of `weight_matrix` that one input feature has."""
    return math.prod(module.kernel_size) if isinstance(module, CONVOLUTIONS) else 1


def weight_matrix(module: nn.Module) -> torch.Tensor:
    """A linear's weight as the mathematics has it, `(n inputs, m outputs)`, detached.

    The inputs of a convolution are the entries of a patch, `taps` in a row for each channel, as `F.unfold` has them.
    """
    weight: Any = module.weight
    return as_matrix(module, values(weight).detach())


def matrix_shape(module: nn.Module) -> tuple[int, int]:
    """Of `weight_matrix`, `(n inputs, m outputs)`, without reading a weight that is offloaded."""
    weight: Any = module.weight
    inputs = input_dim(module)
    return weight.shape[inputs] * taps(module), weight.shape[1 - inputs]


def as_matrix(module: nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """A weight in the linear's own layout, of any number of features, as `(n, m)`; a view of it."""
    return weight if isinstance(module, Conv1D) else weight.flatten(1).T


def as_weight(module: nn.Module, matrix: torch.Tensor) -> torch.Tensor:
    """The reverse of `as_matrix`."""
    if isinstance(module, Conv1D):
        return matrix
    return matrix.T.unflatten(1, (-1, *module.kernel_size)) if isinstance(module, CONVOLUTIONS) else matrix.T


def input_rows(module: nn.Module, inputs: torch.Tensor) -> Iterator[torch.Tensor]:
    """What a linear multiplies its matrix with, a part of the batch at a time.

    Args:
        module: The linear.
        inputs: `(..., n)`, or `(batch, channels, ...)` for a convolution.

    Yields:
        `(rows, n)` in the order of the outputs' positions; `inputs` itself, in one piece, where it is no convolution.
        Patches are unfolded some samples at a time, at most `PATCH_ENTRIES` entries where a sample has fewer.
    """
    if not isinstance(module, CONVOLUTIONS):
        yield inputs.reshape(-1, inputs.shape[-1])
        return
    if inputs.ndim == 1 + len(module.kernel_size):
        inputs = inputs.unsqueeze(0)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    padded = functional.pad(inputs, module._reversed_padding_repeated_twice, mode=mode)  # type: ignore[arg-type]
    kernel, dilation, stride = module.kernel_size, module.dilation, module.stride
    if padded.ndim == 3:  # `F.unfold` takes images
        padded = padded.unsqueeze(2)
        kernel, dilation, stride = (1, *kernel), (1, *dilation), (1, *stride)  # type: ignore[assignment]
    chunk = max(1, PATCH_ENTRIES * math.prod(stride) // (math.prod(kernel) * math.prod(padded.shape[1:])))
    for some in padded.split(chunk):
        yield functional.unfold(some, kernel, dilation, 0, stride).transpose(1, 2).flatten(0, 1)


def output_positions(module: nn.Module, shape: Sequence[int]) -> tuple[int, ...]:
    """Axes of a linear's output other than the features', in the order of the rows of `input_rows`.

    Args:
        module: The linear.
        shape: Of its input.
    """
    if not isinstance(module, CONVOLUTIONS):
        return tuple(shape[:-1])
    sides = len(module.kernel_size)
    padding = module._reversed_padding_repeated_twice[::-1]
    lengths = (
        (shape[axis - sides] + sum(padding[2 * axis : 2 * axis + 2]) - module.dilation[axis] * (k - 1) - 1)
        // module.stride[axis]
        + 1
        for axis, k in enumerate(module.kernel_size)
    )
    return *shape[: -sides - 1], *lengths


def output_rows(module: nn.Module, outputs: torch.Tensor) -> torch.Tensor:
    """A linear's output as `(rows, m)`, in the order of `input_rows`."""
    axis = feature_axis(module)
    return outputs.movedim(axis, -1).reshape(-1, outputs.shape[axis])
