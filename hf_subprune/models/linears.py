"""Layers that map features linearly: `nn.Linear`, `Conv1D` and convolutions, each as one matrix on rows of inputs.

What differs between the kinds stands in one class for each, `Linear` and those made from it. The functions are for a
module of any kind; one of another type (a module that stacks experts) passes for a `Linear`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from .offload import values

PATCH_ENTRIES = 2**24
"""Entries of the patches that are in memory at a time."""


@dataclass(frozen=True)
class Linear:
    """`nn.Linear`, and what the other kinds do not say differently.

    Attributes:
        module: The layer.
        types: Those that are of this kind.
        input_dim: Dimension of the weight along which its inputs lie; its outputs lie along the other one of 0 and 1.
    """

    module: Any
    types: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear,)
    input_dim: ClassVar[int] = 1

    @property
    def is_matrix(self) -> bool:
        """Whether a matrix is all that the weight is."""
        return self.module._parameters["weight"].ndim == 2

    @property
    def kernel(self) -> tuple[int, ...]:
        """Sides of the patch that an output is computed from."""
        return ()

    def as_matrix(self, weight: torch.Tensor) -> torch.Tensor:
        """A weight in the layer's own layout, of any number of features, as `(n inputs, m outputs)`; a view of it."""
        return weight.flatten(1).T

    def as_weight(self, matrix: torch.Tensor) -> torch.Tensor:
        """The reverse of `as_matrix`."""
        return matrix.T

    def rows(self, inputs: torch.Tensor) -> Iterator[torch.Tensor]:
        """As `input_rows`."""
        yield inputs.reshape(-1, inputs.shape[-1])

    def positions(self, shape: Sequence[int]) -> tuple[int, ...]:
        """As `output_positions`."""
        return tuple(shape[:-1])

    def sizes(self, weight: torch.Tensor) -> dict[str, int]:
        """What the layer must remember to agree with a weight, by attribute."""
        return {"out_features": weight.shape[0], "in_features": weight.shape[1]}


class Transposed(Linear):
    """`Conv1D` of Transformers, a linear whose weight is stored as `(inputs, outputs)`."""

    types = (Conv1D,)
    input_dim = 0

    def as_matrix(self, weight: torch.Tensor) -> torch.Tensor:
        return weight

    def as_weight(self, matrix: torch.Tensor) -> torch.Tensor:
        return matrix

    def sizes(self, weight: torch.Tensor) -> dict[str, int]:
        return {"nx": weight.shape[0], "nf": weight.shape[1]}


class Convolution(Linear):
    """Convolutions, whose features are channels; the inputs of the matrix are the entries of a patch."""

    types: ClassVar[tuple[type[nn.Module], ...]] = (nn.Conv1d, nn.Conv2d)

    @property
    def is_matrix(self) -> bool:
        return self.module.groups == 1

    @property
    def kernel(self) -> tuple[int, ...]:
        return self.module.kernel_size

    def as_weight(self, matrix: torch.Tensor) -> torch.Tensor:
        return matrix.T.unflatten(1, (-1, *self.kernel))

    def rows(self, inputs: torch.Tensor) -> Iterator[torch.Tensor]:
        module = self.module
        if inputs.ndim == 1 + len(self.kernel):
            inputs = inputs.unsqueeze(0)
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        padded = functional.pad(inputs, module._reversed_padding_repeated_twice, mode=mode)
        kernel, dilation, stride = self.kernel, module.dilation, module.stride
        if padded.ndim == 3:  # `F.unfold` takes images
            padded = padded.unsqueeze(2)
            kernel, dilation, stride = (1, *kernel), (1, *dilation), (1, *stride)
        chunk = max(1, PATCH_ENTRIES * math.prod(stride) // (math.prod(kernel) * math.prod(padded.shape[1:])))
        for some in padded.split(chunk):
            yield functional.unfold(some, kernel, dilation, 0, stride).transpose(1, 2).flatten(0, 1)

    def positions(self, shape: Sequence[int]) -> tuple[int, ...]:
        module, sides = self.module, len(self.kernel)
        padding = module._reversed_padding_repeated_twice[::-1]
        lengths = (
            (shape[axis - sides] + sum(padding[2 * axis : 2 * axis + 2]) - module.dilation[axis] * (k - 1) - 1)
            // module.stride[axis]
            + 1
            for axis, k in enumerate(self.kernel)
        )
        return *shape[: -sides - 1], *lengths

    def sizes(self, weight: torch.Tensor) -> dict[str, int]:
        module = self.module
        groups = weight.shape[0] // (module.out_channels // module.groups) if module.groups > 1 else 1
        return {"out_channels": weight.shape[0], "in_channels": weight.shape[1] * groups, "groups": groups}


class VolumeConvolution(Convolution):
    """`nn.Conv3d`: its sizes follow its weight, but `F.unfold` has no patches of it."""

    types = (nn.Conv3d,)

    @property
    def is_matrix(self) -> bool:
        return False


def linear_of(module: nn.Module) -> Linear | None:
    """What kind of linear a module is, if it is one."""
    kinds = (Linear, Transposed, Convolution, VolumeConvolution)
    return next((kind(module) for kind in kinds if isinstance(module, kind.types)), None)


def _of(module: nn.Module) -> Linear:
    return linear_of(module) or Linear(module)


def is_linear(module: nn.Module) -> bool:
    """Whether every output feature of `module` is a linear function of all input features, near a position.

    These are `nn.Linear`, `Conv1D` and ungrouped `nn.Conv1d` and `nn.Conv2d` that hold their own floating weight (not
    one that is computed from others, as under weight normalisation), and have not lost all features on one side.
    """
    weight, linear = module._parameters.get("weight"), linear_of(module)
    held = weight is not None and weight.is_floating_point() and weight.numel() > 0
    return linear is not None and held and linear.is_matrix


def is_convolution(module: nn.Module) -> bool:
    """Whether `module` is a convolution, whose features are channels."""
    return isinstance(module, Convolution.types)


def feature_axis(module: nn.Module) -> int:
    """Axis of the features in the inputs and outputs of a linear, counted from the last: -1 but for convolutions."""
    return -1 - len(_of(module).kernel)


def input_dim(module: nn.Module) -> int:
    """Dimension of a linear's weight along which its inputs lie; its outputs lie along the other one of 0 and 1."""
    return _of(module).input_dim


def taps(module: nn.Module) -> int:
    """Entries of the kernel: columns of `weight_matrix` that one input feature has."""
    return math.prod(_of(module).kernel)


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
    return _of(module).as_matrix(weight)


def as_weight(module: nn.Module, matrix: torch.Tensor) -> torch.Tensor:
    """The reverse of `as_matrix`."""
    return _of(module).as_weight(matrix)


def input_rows(module: nn.Module, inputs: torch.Tensor) -> Iterator[torch.Tensor]:
    """What a linear multiplies its matrix with, a part of the batch at a time.

    Args:
        module: The linear.
        inputs: `(..., n)`, or `(batch, channels, ...)` for a convolution.

    Yields:
        `(rows, n)` in the order of the outputs' positions; `inputs` itself, in one piece, where it is no convolution.
        Patches are unfolded some samples at a time, at most `PATCH_ENTRIES` entries where a sample has fewer.
    """
    return _of(module).rows(inputs)


def output_positions(module: nn.Module, shape: Sequence[int]) -> tuple[int, ...]:
    """Axes of a linear's output other than the features', in the order of the rows of `input_rows`.

    Args:
        module: The linear.
        shape: Of its input.
    """
    return _of(module).positions(shape)


def output_rows(module: nn.Module, outputs: torch.Tensor) -> torch.Tensor:
    """A linear's output as `(rows, m)`, in the order of `input_rows`."""
    axis = feature_axis(module)
    return outputs.movedim(axis, -1).reshape(-1, outputs.shape[axis])
