"""Integer attributes that a module's forward reads and that must follow the number of units."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import combinations

from torch import nn

from .blocks import Attribute, Block

COUNT = re.compile(r"head|group")
"""Names of attributes that count heads: `num_heads`, `n_heads`, `num_key_value_groups`, ..."""
WIDTH = re.compile(r"size|dim|width|d_model|features|channels|embed|inner|hidden")
"""Names of attributes that give a number of features: `all_head_size`, `inner_dim`, `split_size`, `embed_dim`, ..."""
MOST = 6
"""Attributes of one sort that are tried in every combination."""


def attribute_sets(model: nn.Module, block: Block, owner: str) -> Iterator[tuple[Attribute, ...]]:
    """Sets of attributes to try for a block, likeliest first; the equivalence check has the last word.

    Candidates are integers on the modules that hold the block's tensors whose value is a whole multiple of the units
    (head counts) or the number of entries that the units own in one tensor (widths). Head counts come first, so that
    a module that never reads its head count still states it correctly.

    Args:
        model: The model.
        block: The block; its `attributes` are ignored.
        owner: Dotted path of the smallest module that holds the block.

    Yields:
        Tuples of attributes, without repetition, the empty one among them.
    """
    counts, widths = candidates(model, block, owner)
    seen = set()
    for chosen_widths in ((), widths, *_subsets(widths)):
        for chosen_counts in _subsets(counts):
            chosen = (*chosen_counts, *chosen_widths)
            key = {(attribute.module, attribute.name) for attribute in chosen}
            if frozenset(key) not in seen:
                seen.add(frozenset(key))
                yield chosen


def candidates(model: nn.Module, block: Block, owner: str) -> tuple[tuple[Attribute, ...], tuple[Attribute, ...]]:
    """Head counts and widths among the integers of the modules that hold the block."""
    owned = {piece.index.numel() for piece in block.slices}
    counts, widths = [], []
    for path in _holders(block, owner):
        for name, value in model.get_submodule(path).__dict__.items():
            if type(value) is not int or value <= 0 or value % block.units:
                continue
            attribute = Attribute(path, name, value, value // block.units)
            if is_width(attribute):
                if value in owned:
                    widths.append(attribute)
            elif COUNT.search(name) and block.columns.shape[1] % attribute.per_unit == 0 and block.kind != "mlp":
                counts.append(attribute)
    return tuple(counts[:MOST]), tuple(widths[:MOST])


def is_width(attribute: Attribute) -> bool:
    """Whether the attribute's name says that it is a number of features rather than of heads."""
    return WIDTH.search(attribute.name) is not None


def _holders(block: Block, owner: str) -> list[str]:
    """The owner and the modules between it and the block's linears, e.g. `attention`, `attention.self`."""
    paths = {owner: None}
    for piece in block.slices:
        parts = piece.tensor.split(".")[:-2]
        for end in range(owner.count(".") + 2 if owner else 1, len(parts) + 1):
            paths[".".join(parts[:end])] = None
    return list(paths)


def _subsets(attributes: tuple[Attribute, ...]) -> Iterator[tuple[Attribute, ...]]:
    for size in range(len(attributes), -1, -1):
        yield from combinations(attributes, size)
