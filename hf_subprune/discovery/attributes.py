"""Integer attributes that may have to follow the number of units for a block to shrink exactly, likeliest first."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import combinations

from ..blocks import Attribute, Block
from ..models.forwards import INNER_WIDTH, reading_inner_width
from ..models.paths import Modules

COUNT = re.compile(r"head|group")
"""Names of attributes that count heads: `num_heads`, `n_heads`, `num_key_value_groups`, ..."""
GROUP = re.compile(r"group")
"""Names of attributes that count the query heads of one key/value head: `num_key_value_groups`, ..."""
WIDTH = re.compile(r"size|dim|width|d_model|features|channels|embed|inner|hidden")
"""Names of attributes that give a number of features: `all_head_size`, `inner_dim`, `split_size`, `embed_dim`, ..."""
MOST = 6
"""Attributes of one sort that are tried in every combination."""


def attribute_sets(modules: Modules, block: Block) -> Iterator[tuple[Attribute, ...]]:
    """Sets of attributes to try for a block, likeliest first; the equivalence check has the last word.

    Candidates are integers on the modules that hold the block's tensors whose value is a whole multiple of the units
    (head counts), or at most the number of entries that the units own in one tensor (widths, likeliest where they are
    that number: others say how a fused projection is split). Head counts come first, so that a module that never
    reads its head count still states it correctly.

    Args:
        modules: Of the model.
        block: The block; its `attributes` are ignored.

    Yields:
        Tuples of attributes, without repetition, the empty one among them.
    """
    counts, widths, configured, inner = _candidates(modules, block)
    owned = {piece.index.numel() for piece in block.slices}
    likely = tuple(width for width in widths if width.before in owned)
    choices = [(some, few) for some in ((), likely, widths) for few in _subsets(counts)]
    choices += [(some, few) for some in _subsets(widths) for few in (counts, ())]
    # A forward that takes the width of its heads to be that of its input is rewritten.
    choices += [((*some, width), few) for width in inner for some in ((), likely, widths) for few in _subsets(counts)]
    # A forward that reads the config needs a copy of it for its layer: the last resort.
    choices += [(some, few) for some in _subsets(configured) for few in _subsets(counts)]
    seen = set()
    for some, few in choices:
        names = frozenset((attribute.module, attribute.name) for attribute in (*few, *some))
        if names not in seen:
            seen.add(names)
            yield *few, *some


def attributes_named(modules: Modules, block: Block, names: Sequence[tuple[str, str]]) -> tuple[Attribute, ...]:
    """The attributes of a block among those that can follow its units.

    Args:
        modules: Of the model.
        block: The block.
        names: Of attributes, each behind the path of its module within the block's owner; what is no candidate here is
            passed over.
    """
    owner = block.owner
    found = {(one.module, one.name): one for group in _candidates(modules, block) for one in group}
    return tuple(found[owner + module, name] for module, name in names if (owner + module, name) in found)


def _candidates(modules: Modules, block: Block) -> tuple[tuple[Attribute, ...], ...]:
    """Head counts and widths among the integers of the modules that hold the block; head counts in their config; and
    widths that forwards of them derive from their input.
    """
    owned = {piece.index.numel() for piece in block.slices}
    counts, widths, configured, inner = [], [], [], []
    heads = block.kind == "attention"
    for path in holders(block):
        module = modules[path]
        if reading_inner_width(type(module).forward) is not None:
            inner.append(Attribute(path, INNER_WIDTH, block.columns.numel(), block.columns.shape[1]))
        for name, value in module.__dict__.items():
            attribute = _attribute(block, path, name, value)
            if attribute is not None and is_width(attribute):
                if value in owned or (heads and max(block.columns.shape) <= value < max(owned)):
                    widths.append(attribute)
            elif attribute is not None and _counts_heads(block, attribute):
                counts.append(attribute)
        for name, value in getattr(module.__dict__.get("config"), "__dict__", {}).items():
            attribute = _attribute(block, path, f"config.{name}", value)
            if attribute is not None and not is_width(attribute) and _counts_heads(block, attribute):
                configured.append(attribute)
    widths.sort(key=lambda attribute: attribute.before not in owned)
    return tuple(counts[:MOST]), tuple(widths[:MOST]), tuple(configured[:MOST]), tuple(inner)


def _attribute(block: Block, path: str, name: str, value: object) -> Attribute | None:
    if type(value) is not int or value <= 0:
        return None
    per_unit = Fraction(value, block.units)
    # Not left to the check: without a mask, attention may do without the number that it needs with one.
    of_a_set = value * block.sets == block.units and GROUP.search(name)
    if per_unit.denominator > 1 and not of_a_set:
        return None
    # How many query heads a key/value head has says nothing of the number of key/value heads.
    of_sets = () if block.queries is None else block.queries.attributes
    if any((path, name) == (one.module, one.name) and one.per_unit.denominator > 1 for one in of_sets):
        return None
    return Attribute(path, name, value, per_unit)


def _counts_heads(block: Block, attribute: Attribute) -> bool:
    named = COUNT.search(attribute.name) is not None
    return named and block.kind == "attention" and block.columns.shape[1] % attribute.per_unit == 0


def is_width(attribute: Attribute) -> bool:
    """Whether the attribute's name says that it is a number of features rather than of heads."""
    return WIDTH.search(attribute.name) is not None


def holders(block: Block) -> list[str]:
    """The owner and the modules from it to those that hold the block's linears, e.g. `attention`, `attention.self`."""
    owner = block.owner
    paths = {owner: None}
    for piece in block.slices:
        *parts, leaf = piece.tensor.split(".")
        if leaf in ("weight", "bias"):
            parts = parts[:-1]  # without the linear or the norm itself
        for end in range(owner.count(".") + 2 if owner else 1, len(parts) + 1):
            paths[".".join(parts[:end])] = None
    return list(paths)


def _subsets(attributes: tuple[Attribute, ...]) -> Iterator[tuple[Attribute, ...]]:
    for size in range(len(attributes), -1, -1):
        yield from combinations(attributes, size)
