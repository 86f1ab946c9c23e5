"""Find the arguments of a forward, made outside of its module, that have entries for every unit of a block."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from itertools import combinations, islice, product
from typing import Any

import torch
from torch import nn

from ..blocks import Argument, Block
from ..models.forwards import CUT_ARGUMENTS
from ..models.paths import Modules

MOST = 24
"""Sets of arguments that are tried."""

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and named arguments of one call of a module."""

Place = tuple[str, str, int, int]
"""Path of a module, name of an argument, dimension, entries along it with all units and before any cut."""


def argument_sets(
    modules: Modules, block: Block, paths: list[str], calls: Callable[[str], list[Call]]
) -> Iterator[list[Place]]:
    """Sets of arguments to cut with the units of a block, smallest first.

    Candidates are tensors with a dimension as long as the block has units, or heads in all units, or with a first one
    of that times the batch.

    Args:
        modules: Of the model.
        block: The block.
        paths: Modules that hold the block, outermost first.
        calls: Of the module at a path, in one forward of the model.
    """
    for path in paths:
        places: dict[str, list[Place]] = {}
        for name, value in _given(modules[path], calls(path)).items():
            found = list(_places(modules[path], block, path, name, value))
            if found:
                places[name] = found
        sets = (
            list(chosen)
            for size in range(1, len(places) + 1)
            for names in combinations(places, size)
            for chosen in product(*(places[name] for name in names))
        )
        yield from islice(sets, MOST)


def argument(module: nn.Module, block: Block, place: Place) -> Argument:
    """The argument at a place in a module, with the entries that each unit of this block reads.

    A unit's columns lie in order of its heads, so that equal parts of all columns are those of the entries.
    """
    path, name, dim, entries = place
    present = _present(module, name, entries)
    per_entry = block.columns.numel() // present
    index = torch.stack([(columns // per_entry).unique() for columns in block.columns])
    return Argument(path, name, dim, entries, index)


def _given(module: nn.Module, calls: list[Call]) -> dict[str, torch.Tensor]:
    """The first tensors that the forward of a module is given, by name."""
    parameters = inspect.signature(type(module).forward).parameters.values()
    names = [one.name for one in parameters if one.kind is one.POSITIONAL_OR_KEYWORD][1:]
    given: dict[str, torch.Tensor] = {}
    for args, kwargs in calls:
        for name, value in [*zip(names, args, strict=False), *kwargs.items()]:
            if isinstance(value, torch.Tensor) and name in names:
                given.setdefault(name, value)
    return given


def _places(module: nn.Module, block: Block, path: str, name: str, value: torch.Tensor) -> Iterator[Place]:
    units, width = block.columns.shape
    known = vars(module).get(CUT_ARGUMENTS, {})
    if name in known:
        yield path, name, *known[name]
        return
    batch = value.shape[0] if value.ndim else 0
    # One entry for each unit first: for a batch of two, those of all heads could be two for each of them as well.
    for entries in (units * heads for heads in range(1, max(width, 2)) if width % heads == 0):
        yield from ((path, name, dim, entries) for dim, size in enumerate(value.shape) if size == entries)
        if batch != entries and batch % entries == 0:
            yield path, name, 0, entries


def _present(module: nn.Module, name: str, entries: int) -> int:
    """Entries that are left of an argument by now."""
    kept = module._buffers.get(f"kept_{name}")
    return entries if kept is None else kept.numel()
