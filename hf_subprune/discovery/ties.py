"""Find the blocks that can only keep the same units, as they read something that is made once for all of them."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch

from ..blocks import Block, Slice, groups_of, parameters_per_unit


def tie_shared(
    parameters: Mapping[str, torch.Tensor], blocks: Sequence[Block], readers: Mapping[str, set[str]]
) -> tuple[list[Block], list[tuple[Block, str]]]:
    """Tie blocks whose units own the same entries of the same parameter; it shrinks with the first of them.

    Args:
        parameters: Of the model, by dotted path.
        blocks: Named, in the order of the forward; slices of parameters that have other readers are marked as shared.
        readers: By parameter, the consumers that depend on it.

    Returns:
        All blocks but those that share a parameter with something that is no such block, and these with the reason.
    """
    groups: dict[tuple, list[Block]] = {}
    for block in blocks:
        key = tuple(sorted((piece.tensor, piece.dim) for piece in _shared(block)))
        groups.setdefault(key or (block.name,), []).append(block)
    found: dict[str, Block] = {}
    apart: list[tuple[Block, str]] = []
    for group in groups.values():
        first = group[0]
        shared = [piece.tensor for piece in _shared(first)]
        consumers = {block.consumer for block in group}
        outside = {reader for name in shared for reader in readers[name]} - consumers
        if not shared:
            found[first.name] = first
        elif outside or not all(_same_entries(block, first) for block in group):
            for block in group:
                other = min(outside or consumers - {block.consumer})
                apart.append((block, f"rows of {shared[0]!r} that its units own also feed {other!r}"))
        else:
            found |= {block.name: block for block in tied_together(group)}
            for name in (block.name for block in group[1:]):
                own = tuple(piece for piece in found[name].slices if not piece.shared)
                found[name] = replace(
                    found[name], slices=own, parameters_per_unit=parameters_per_unit(parameters, own)
                )
    return [found[block.name] for block in blocks if block.name in found], apart


def by_choice(blocks: Iterable[Block]) -> list[tuple[Block, ...]]:
    """Blocks of one tie together, and any other alone: in the order of their first."""
    return [together for group in groups_of(blocks) for together in group.choices]


def tied_together(blocks: Sequence[Block]) -> list[Block]:
    """The same blocks, tied to one another."""
    names = [block.name.split(".") for block in blocks]
    pattern = ".".join(parts[0] if len(set(parts)) == 1 else "*" for parts in zip(*names, strict=False))
    return [replace(block, tie=pattern) for block in blocks]


def alike(block: Block) -> tuple:
    """Equal for blocks of one name but for the numbers of their layers, of one kind and with as many units."""
    return (re.sub(r"\b\d+\b", "*", block.name), block.kind, tuple(block.columns.shape))


def _shared(block: Block) -> list[Slice]:
    return [piece for piece in block.slices if piece.shared]


def _same_entries(one: Block, other: Block) -> bool:
    pairs = zip(_shared(one), _shared(other), strict=True)
    return one.columns.shape == other.columns.shape and all(torch.equal(a.index, b.index) for a, b in pairs)
