"""Find the arguments of a forward, made outside of its module, that have entries for every unit of a block."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from itertools import combinations, islice, product
from typing import Any

import torch
from torch import nn

from ..blocks import Argument, Block
from ..models.forwards import CUT_ARGUMENTS
from ..models.running import undisturbed

MOST = 24
"""Sets of arguments that are tried."""

Place = tuple[str, str, int, int]
"""Path of a module, name of an argument, dimension, entries along it with all units and before any cut."""


def argument_sets(
    model: nn.Module, block: Block, paths: list[str], inputs: Mapping[str, Any]
) -> Iterator[list[Place]]:
    """Sets of arguments to cut with the units of a block, smallest first.

    Candidates are tensors with a dimension as long as the block has units, or heads in all units, or with a first one
    of that times the batch.

    Args:
        model: The model.
        block: The block.
        paths: Modules that hold the block, outermost first.
        inputs: Keyword arguments of the forward.
    """
    for path in paths:
        places: dict[str, list[Place]] = {}
        for name, value in _given(model, path, inputs).items():
            found = list(_places(model, block, path, name, value))
            if found:
                places[name] = found
        sets = (
            list(chosen)
            for size in range(1, len(places) + 1)
            for names in combinations(places, size)
            for chosen in product(*(places[name] for name in names))
        )
        yield from islice(sets, MOST)


def argument(model: nn.Module, block: Block, place: Place) -> Argument:
    """The argument at a place, with the entries that each unit of this block reads.

    A unit's columns lie in order of its heads, so that equal parts of all columns are those of the entries.
    """
    path, name, dim, entries = place
    present = _present(model, path, name, entries)
    per_entry = block.columns.numel() // present
    index = torch.stack([(columns // per_entry).unique() for columns in block.columns])
    return Argument(path, name, dim, entries, index)


def _given(model: nn.Module, path: str, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Tensors that the forward of a module is given in its first call, by name."""
    module = model.get_submodule(path)
    parameters = inspect.signature(type(module).forward).parameters.values()
    names = [one.name for one in parameters if one.kind is one.POSITIONAL_OR_KEYWORD][1:]
    given: dict[str, torch.Tensor] = {}

    def record(_: nn.Module, args: tuple, kwargs: dict) -> None:
        for name, value in [*zip(names, args, strict=False), *kwargs.items()]:
            if isinstance(value, torch.Tensor) and name in names:
                given.setdefault(name, value)

    handle = module.register_forward_pre_hook(record, with_kwargs=True)
    try:
        with undisturbed(model), torch.no_grad():
            model(**inputs)
    finally:
        handle.remove()
    return given


def _places(model: nn.Module, block: Block, path: str, name: str, value: torch.Tensor) -> Iterator[Place]:
    units, width = block.columns.shape
    known = vars(model.get_submodule(path)).get(CUT_ARGUMENTS, {})
    if name in known:
        yield path, name, *known[name]
        return
    batch = value.shape[0] if value.ndim else 0
    # One entry for each unit first: for a batch of two, those of all heads could be two for each of them as well.
    for entries in (units * heads for heads in range(1, max(width, 2)) if width % heads == 0):
        yield from ((path, name, dim, entries) for dim, size in enumerate(value.shape) if size == entries)
        if batch != entries and batch % entries == 0:
            yield path, name, 0, entries


def _present(model: nn.Module, path: str, name: str, entries: int) -> int:
    """Entries that are left of an argument by now."""
    kept = model.get_submodule(path)._buffers.get(f"kept_{name}")
    return entries if kept is None else kept.numel()
