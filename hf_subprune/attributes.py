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
    counts, widths, configured = candidates(model, block, owner)
    choices = [(some, few) for some in ((), widths, *_subsets(widths)) for few in _subsets(counts)]
    # A forward that reads the config needs a copy of it for its layer: the last resort.
    choices += [(some, few) for some in _subsets(configured) for few in _subsets(counts)]
    seen = set()
    for some, few in choices:
        names = frozenset((attribute.module, attribute.name) for attribute in (*few, *some))
        if names not in seen:
            seen.add(names)
            yield *few, *some


def candidates(model: nn.Module, block: Block, owner: str) -> tuple[tuple[Attribute, ...], ...]:
    """Head counts and widths among the integers of the modules that hold the block; head counts in their config."""
    owned = {piece.index.numel() for piece in block.slices}
    counts, widths, configured = [], [], []
    for path in _holders(block, owner):
        module = model.get_submodule(path)
        for name, value in module.__dict__.items():
            attribute = _attribute(block, path, name, value)
            if attribute is not None and is_width(attribute):
                if value in owned:
                    widths.append(attribute)
            elif attribute is not None and _counts_heads(block, attribute):
                counts.append(attribute)
        for name, value in getattr(module.__dict__.get("config"), "__dict__", {}).items():
            attribute = _attribute(block, path, f"config.{name}", value)
            if attribute is not None and not is_width(attribute) and _counts_heads(block, attribute):
                configured.append(attribute)
    return tuple(counts[:MOST]), tuple(widths[:MOST]), tuple(configured[:MOST])


def _attribute(block: Block, path: str, name: str, value: object) -> Attribute | None:
    if type(value) is not int or value <= 0 or value % block.units:
        return None
    return Attribute(path, name, value, value // block.units)


def _counts_heads(block: Block, attribute: Attribute) -> bool:
    named = COUNT.search(attribute.name) is not None
    return named and block.kind == "attention" and block.columns.shape[1] % attribute.per_unit == 0


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
