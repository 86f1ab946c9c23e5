"""Units that are removed from a model which keeps its shapes: all of their parameters are zero and stay so."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..blocks import Block
from ..models.linears import as_matrix, feature_axis, taps
from .edits import Edit, checked_units


@contextmanager
def masked(model: nn.Module, block: Block, kept: Sequence[int] | torch.Tensor) -> Iterator[None]:
    """Within the context, the consumer of `block` reads zeros in the columns of every unit that is not in `kept`.

    Args:
        model: The model that `block` was discovered in; it is not changed.
        block: The block to mask.
        kept: `(k,)` unit indices, strictly increasing, at least one.

    Raises:
        ValueError: `kept` is empty, unsorted or out of range.
    """
    units = checked_units(block, kept)
    consumer = model.get_submodule(block.consumer)
    removed = torch.ones(block.columns.numel() // taps(consumer), dtype=torch.bool)
    removed[block.columns[units].flatten() // taps(consumer)] = False
    removed = removed.view(-1, *[1] * (-1 - feature_axis(consumer)))

    def zero_removed(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        # masked_fill, not a product with zeros: inf * 0 is NaN.
        if args:
            return (args[0].masked_fill(removed.to(args[0].device), 0), *args[1:]), kwargs
        name, value = next(iter(kwargs.items()))
        return args, {**kwargs, name: value.masked_fill(removed.to(value.device), 0)}

    handle = consumer.register_forward_pre_hook(zero_removed, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


class Mask:
    """The removed units of one block, as zeros in the model's own parameters.

    A unit whose columns in the consumer are zero has no part in the output; with its producers' rows zero as well, no
    gradient reaches it, so that it counts neither in the gradient's norm nor in the optimizer's statistics.

    Args:
        model: The model that `block` was discovered in, unshrunk.
        block: The block.
        kept: `(k,)` int64, the units that are not removed.
    """

    def __init__(self, model: nn.Module, block: Block, kept: torch.Tensor) -> None:
        removed = torch.ones(block.units, dtype=torch.bool)
        removed[kept] = False
        parameters = dict(model.named_parameters(remove_duplicate=False))
        self._zeros = [
            (parameter, piece.dim, piece.index[removed].flatten().to(parameter.device))
            for piece in block.slices
            if (parameter := parameters.get(piece.tensor)) is not None
        ]

    def apply(self) -> None:
        """Set the removed units' parameters to zero."""
        with torch.no_grad():
            for parameter, dim, index in self._zeros:
                parameter.index_fill_(dim, index, 0)

    def clear(self, state: Mapping[nn.Parameter, Mapping[str, Any]]) -> None:
        """Set the removed units' entries to zero in every optimizer statistic that has its parameter's shape.

        Args:
            state: `optimizer.state`.
        """
        for parameter, dim, index in self._zeros:
            for value in state.get(parameter, {}).values():
                if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                    value.index_fill_(dim, index, 0)


class MaskEdit(Edit):
    """Units masked, and the consumer's weights on the others written in place: an edit that changes no shape.

    Args:
        model: The model that `block` was discovered in, unshrunk.
        block: The block.
        kept: `(k,)` int64, sorted: units that are not masked.
        weight: `(k * c, m)`, the consumer's weight on the columns of the kept units, inputs by outputs; the present
            one when `None`.
        bias: `(m,)`, the consumer's bias; the present one when `None`.
    """

    def __init__(
        self,
        model: nn.Module,
        block: Block,
        kept: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
    ) -> None:
        super().__init__(block.name, kept)
        consumer: Any = model.get_submodule(block.consumer)
        parameters = dict(model.named_parameters(remove_duplicate=False))
        owned = [parameters[piece.tensor] for piece in block.slices if piece.tensor in parameters]
        touched = {id(p): p for p in (*owned, consumer.weight, consumer.bias) if p is not None}
        self._before = _copies(touched.values())
        columns = block.columns[kept].flatten().sort().values.to(consumer.weight.device)
        with torch.no_grad():
            if weight is not None:
                as_matrix(consumer, consumer.weight)[columns] = weight.to(consumer.weight)
            if bias is not None:
                consumer.bias.copy_(bias)
        Mask(model, block, kept).apply()
        self._after = _copies(touched.values())

    def undo(self) -> None:
        """Write the parameters back as they were."""
        _write(self._before)

    def redo(self) -> None:
        """Write the masked and reweighted parameters again."""
        _write(self._after)


def mask(
    model: nn.Module,
    block: Block,
    kept: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> MaskEdit:
    """As `edits.shrink`, of a model that keeps its shapes: units that are not `kept` are zero."""
    return MaskEdit(model, block, kept, weight, bias)


def _copies(parameters: Any) -> Sequence[tuple[nn.Parameter, torch.Tensor]]:
    return [(parameter, parameter.detach().clone()) for parameter in parameters]


@torch.no_grad()
def _write(values: Sequence[tuple[nn.Parameter, torch.Tensor]]) -> None:
    for parameter, value in values:
        parameter.copy_(value)
