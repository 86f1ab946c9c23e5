"""Find the blocks that can only keep the same units, as they read something that is made once for all of them."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from .blocks import Block, parameters_per_unit


def tie_shared(
    model: nn.Module, blocks: Sequence[Block], readers: Mapping[str, set[str]]
) -> tuple[list[Block], list[tuple[Block, str]]]:
    """Tie blocks whose units own the same entries of the same parameter; it shrinks with the first of them.

    Args:
        model: The model.
        blocks: Named, in the order of the forward; slices of parameters that have other readers are marked as shared.
        readers: By parameter, the consumers that depend on it.

    Returns:
        All blocks but those that share a parameter with something that is no such block, and these with the reason.
    """
    groups: dict[tuple, list[Block]] = {}
    for block in blocks:
        shared = tuple(sorted((piece.tensor, piece.dim) for piece in block.slices if piece.shared))
        groups.setdefault(shared or (block.name,), []).append(block)
    tied: dict[str, Block] = {}
    apart: list[tuple[Block, str]] = []
    for group in groups.values():
        shared = [piece for piece in group[0].slices if piece.shared]
        if not shared:
            tied[group[0].name] = group[0]
            continue
        outside = set().union(*(readers[piece.tensor] for piece in shared)) - {block.consumer for block in group}
        if outside or not all(_same_entries(block, group[0]) for block in group):
            for block in group:
                others = outside or {other.consumer for other in group if other is not block}
                reason = f"rows of {shared[0].tensor!r} that its units own also feed {min(others)!r}"
                apart.append((block, reason))
            continue
        first, *others = tied_together(group)
        tied[first.name] = first
        for block in others:
            own = tuple(piece for piece in block.slices if not piece.shared)
            tied[block.name] = replace(block, slices=own, parameters_per_unit=parameters_per_unit(model, own))
    return [tied[block.name] for block in blocks if block.name in tied], apart


def tied_together(blocks: Sequence[Block]) -> list[Block]:
    """The same blocks, tied to one another."""
    names = [block.name.split(".") for block in blocks]
    pattern = ".".join(parts[0] if len(set(parts)) == 1 else "*" for parts in zip(*names, strict=False))
    return [replace(block, tie=pattern) for block in blocks]


def alike(block: Block) -> tuple:
    """Equal for blocks of one name but for the numbers of their layers, of one kind and with as many units."""
    return (re.sub(r"\b\d+\b", "*", block.name), block.kind, tuple(block.columns.shape))


def _same_entries(one: Block, other: Block) -> bool:
    mine, theirs = ([piece.index for piece in block.slices if piece.shared] for block in (one, other))
    return one.columns.shape == other.columns.shape and all(map(torch.equal, mine, theirs))
