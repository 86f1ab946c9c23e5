"""Units that are removed from a model which keeps its shapes: all of their parameters are zero and stay so."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..blocks import Block
from ..models.linears import as_matrix, feature_axis, taps
from ..models.running import hooked
from .edits import checked_units

_Values = Sequence[tuple[nn.Parameter, torch.Tensor]]


@contextmanager
def masked(consumer: nn.Module, block: Block, kept: Sequence[int] | torch.Tensor) -> Iterator[None]:
    """Within the context, the consumer of a block reads zeros in the columns of every unit that is not in `kept`.

    Args:
        consumer: The block's consumer; it is not changed.
        block: The block to mask.
        kept: `(k,)` unit indices, strictly increasing; none of a `removable` block.

    Raises:
        ValueError: `kept` is unsorted, out of range, or empty where the block cannot go.
    """
    units = checked_units(block, kept)
    removed = torch.ones(block.columns.numel() // taps(consumer), dtype=torch.bool)
    removed[block.columns[units].flatten() // taps(consumer)] = False
    removed = removed.view(-1, *[1] * (-1 - feature_axis(consumer)))

    def zero_removed(args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        # masked_fill, not a product with zeros: inf * 0 is NaN.
        if args:
            return (args[0].masked_fill(removed.to(args[0].device), 0), *args[1:]), kwargs
        name, value = next(iter(kwargs.items()))
        return args, {**kwargs, name: value.masked_fill(removed.to(value.device), 0)}

    with hooked(consumer, arguments=[("", zero_removed)]):
        yield


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


def mask(
    model: nn.Module,
    block: Block,
    kept: Sequence[int] | torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> MaskEdit:
    """Mask every unit of `block` that is not in `kept`, in place: as `edits.shrink`, but shapes and objects stay.

    Args:
        model: The model that `block` was discovered in, unshrunk.
        block: What to mask.
        kept: `(k,)` unit indices, strictly increasing; none of a `removable` block.
        weight: `(k * c, m)` new consumer weight on the columns of the kept units, inputs by outputs; the present one
            when omitted.
        bias: `(m,)` new consumer bias; the present one when omitted.

    Returns:
        The edit, in place; `Edit.undo()` takes it back.

    Raises:
        ValueError: `kept` is unsorted, out of range, or empty where the block cannot go.
    """
    units = checked_units(block, kept)
    consumer: Any = model.get_submodule(block.consumer)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    owned = [parameters[piece.tensor] for piece in block.slices if piece.tensor in parameters]
    touched = {id(p): p for p in (*owned, consumer.weight, consumer.bias) if p is not None}
    before = _copies(touched.values())
    columns = block.columns[units].flatten().sort().values.to(consumer.weight.device)
    try:
        with torch.no_grad():
            if weight is not None:
                as_matrix(consumer, consumer.weight)[columns] = weight.to(consumer.weight)
            if bias is not None:
                consumer.bias.copy_(bias)
        Mask(model, block, units).apply()
        return MaskEdit(block.name, units, before, _copies(touched.values()))
    except BaseException:  # an interrupt, too
        _write(before)
        raise


@dataclass(eq=False)
class MaskEdit:
    """An edit that writes values into the parameters that there are.

    Args:
        block: As of `Edit`.
        kept: As of `Edit`.
    """

    block: str
    kept: torch.Tensor
    _before: _Values = field(repr=False)
    _after: _Values = field(repr=False)

    def undo(self) -> None:
        """As `Edit`: write the parameters back as they were."""
        _write(self._before)

    def redo(self) -> None:
        """As `Edit`: write the masked and reweighted parameters again."""
        _write(self._after)


def _copies(parameters: Iterable[nn.Parameter]) -> _Values:
    return [(parameter, parameter.detach().clone()) for parameter in parameters]


@torch.no_grad()
def _write(values: _Values) -> None:
    """Write all of the values; an interrupt comes behind the last."""
    try:
        for parameter, value in values:
            parameter.copy_(value)
    except BaseException:
        for parameter, value in values:
            parameter.copy_(value)
        raise
