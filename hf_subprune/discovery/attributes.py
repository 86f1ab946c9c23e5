"""Settle which integer attributes must follow the number of units for a block to shrink exactly, if any do."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import chain, combinations, islice
from typing import Any

import torch
from torch import nn

from ..blocks import Attribute, Block, by_tie
from ..models.forwards import INNER_WIDTH, reading_inner_width
from ..surgery.verification import EquivalenceError, verify
from .arguments import Place, argument, argument_sets
from .ties import alike, tied_together

COUNT = re.compile(r"head|group")
"""Names of attributes that count heads: `num_heads`, `n_heads`, `num_key_value_groups`, ..."""
GROUP = re.compile(r"group")
"""Names of attributes that count the query heads of one key/value head: `num_key_value_groups`, ..."""
WIDTH = re.compile(r"size|dim|width|d_model|features|channels|embed|inner|hidden")
"""Names of attributes that give a number of features: `all_head_size`, `inner_dim`, `split_size`, `embed_dim`, ..."""
MOST = 6
"""Attributes of one sort that are tried in every combination."""
LIKELIEST = 16
"""Sets of attributes that are tried with each set of arguments."""


def settle(
    model: nn.Module, blocks: list[Block], inputs: Mapping[str, Any]
) -> tuple[list[Block], list[tuple[Block, str]]]:
    """Settle each block's attributes and keep the blocks that shrink exactly.

    Layers of one class take the same attributes: they are searched for on the first and confirmed on all at once.

    Args:
        model: The model.
        blocks: Candidates in the order of the forward, with unique names; their `attributes` are ignored.
        inputs: Keyword arguments of the forward, a small batch.

    Returns:
        The blocks that shrink exactly, with their attributes, and the others with the reason.
    """
    order = {block.name: i for i, block in enumerate(blocks)}
    number = _numbers(blocks)
    kept = {block.name: _half(block, i, number[block.name]) for i, tie in enumerate(by_tie(blocks)) for block in tie}
    settled: dict[tuple, _Settled | EquivalenceError] = {}
    exact: list[Block] = []
    inexact: list[tuple[Block, str]] = []
    for group in by_tie(blocks):
        key = tuple(_signature(model, block) for block in group)
        if key not in settled:
            settled[key] = _search(model, group, kept, inputs)
        found = settled[key]
        if isinstance(found, EquivalenceError):
            inexact += [(block, found.reason) for block in group]
        else:
            exact += [found.of(model, block) for block in group]
    exact.sort(key=lambda block: order[block.name])
    # As a rule one check of all blocks at once. If it fails, those like the ones at fault keep the same units; if that
    # is not it, each is checked alone, and those that pass once more.
    checks = [exact]
    if any(block.units < 4 for block in exact):
        # A single unit left of a few fits several by broadcasting: leave every other block whole.
        checks.append([block for block in exact if number[block.name] % 2])
    errors = (error for some in checks if some and (error := _failure(model, some, kept, inputs)) is not None)
    error = next(errors, None)
    together = None if error is None else _together(model, exact, error, kept, inputs)
    if together is not None:
        exact = together
    elif error is not None:
        alone = [(group, _failure(model, group, kept, inputs)) for group in by_tie(exact)]
        failed = {block.name: error.reason for group, error in alone if error is not None for block in group}
        fitting = _tied(model, exact, failed, kept, inputs)
        for group, _ in alone:
            if group[0].name in failed.keys() - fitting.keys():
                fitting |= _apart(model, group, kept, inputs)
        inexact += [(block, failed[block.name]) for block in exact if block.name in failed.keys() - fitting.keys()]
        exact = [
            fitting.get(block.name, block) for block in exact if block.name in fitting or block.name not in failed
        ]
        while exact and (error := _failure(model, exact, kept, inputs)) is not None:
            culprit = next(group for group in by_tie(exact) if error.block in {block.name for block in group})
            inexact += [(block, error.reason) for block in culprit]
            exact = [block for block in exact if block not in culprit]
    return exact, inexact


def _apart(
    model: nn.Module, group: list[Block], kept: Mapping[str, torch.Tensor], inputs: Mapping[str, Any]
) -> dict[str, Block]:
    """By name, a block or a tie that shrinks exactly with what others of its class do not take, if it does."""
    found = _search(model, group, kept, inputs)
    if isinstance(found, _Settled):
        group = [found.of(model, block) for block in group]
        if _failure(model, group, kept, inputs) is None:
            return {block.name: block for block in group}
    return {}


def _together(
    model: nn.Module,
    blocks: list[Block],
    error: EquivalenceError | None,
    kept: dict[str, torch.Tensor],
    inputs: Mapping[str, Any],
) -> list[Block] | None:
    """The blocks, those like the ones at fault tied, if all of them shrink exactly so; `kept` follows."""
    same = dict(kept)
    while error is not None:
        culprit = next(block for block in blocks if block.name == error.block)
        group = [block for block in blocks if block.tie is None and alike(block) == alike(culprit)]
        if culprit.tie is not None or len(group) == 1:
            return None
        tied = {block.name: block for block in tied_together(group)}
        same |= dict.fromkeys(tied, kept[group[0].name])
        blocks = [tied.get(block.name, block) for block in blocks]
        error = _failure(model, blocks, same, inputs)
    kept.update(same)
    return blocks


def _tied(
    model: nn.Module,
    blocks: list[Block],
    failed: Collection[str],
    kept: dict[str, torch.Tensor],
    inputs: Mapping[str, Any],
) -> dict[str, Block]:
    """By name, blocks some of which fail alone but that shrink exactly when all keep the same units; `kept` follows.

    Each of them shrinks exactly up to its own consumer; it is what the first of them hands on to the others that has
    as many units as it.
    """
    groups: dict[tuple, list[Block]] = {}
    for block in blocks:
        if block.tie is None:
            groups.setdefault(alike(block), []).append(block)
    exact: dict[str, Block] = {}
    for group in groups.values():
        if len(group) > 1 and any(block.name in failed for block in group):
            tied, same = tied_together(group), {block.name: kept[group[0].name] for block in group}
            if _failure(model, tied, same, inputs) is None:
                kept.update(same)
                exact |= {block.name: block for block in tied}
    return exact


def _numbers(blocks: list[Block]) -> dict[str, int]:
    """By name, how many blocks like it come before each block; a tie counts as one."""
    numbers: dict[str, int] = {}
    seen: Counter[tuple] = Counter()
    for tie in by_tie(blocks):
        numbers |= {block.name: seen[alike(tie[0])] for block in tie}
        seen[alike(tie[0])] += 1
    return numbers


def _failure(
    model: nn.Module,
    blocks: list[Block],
    kept: Mapping[str, torch.Tensor],
    inputs: Mapping[str, Any],
    to_consumer: bool = False,
) -> EquivalenceError | None:
    try:
        verify(model, blocks, kept, inputs, to_consumer=to_consumer)
    except EquivalenceError as error:
        return error
    return None


def _half(block: Block, seed: int, number: int) -> torch.Tensor:
    """About half of each set's units, as many as `number` is even or odd: blocks of one class keep other numbers."""
    random = torch.Generator().manual_seed(seed)
    size = block.units // block.sets
    count = max(1, min(size - 1, size // 2 + number % 2))
    chosen = [start + torch.randperm(size, generator=random)[:count] for start in range(0, block.units, size)]
    return torch.cat(chosen).sort().values


def _signature(model: nn.Module, block: Block) -> tuple:
    """Equal for blocks of one class in different layers."""
    owner = block.owner
    pieces = [(piece.tensor.removeprefix(owner), piece.dim, tuple(piece.index.shape)) for piece in block.slices]
    return (type(model.get_submodule(owner)), block.kind, tuple(block.columns.shape), *pieces)


@dataclass(frozen=True)
class _Settled:
    """What must follow the units of blocks of one class, by module path within a block's owner.

    Args:
        names: Of attributes, with their modules.
        places: Of arguments that are cut.
    """

    names: tuple[tuple[str, str], ...]
    places: tuple[Place, ...] = ()

    def of(self, model: nn.Module, block: Block) -> Block:
        """A block of this class with its own attributes and arguments."""
        places = [(block.owner + path, name, dim, entries) for path, name, dim, entries in self.places]
        cut = tuple(argument(model, block, place) for place in places)
        return replace(block, attributes=_attributes(model, block, self.names), arguments=cut)


def _search(
    model: nn.Module, group: list[Block], kept: Mapping[str, torch.Tensor], inputs: Mapping[str, Any]
) -> _Settled | EquivalenceError:
    """What must follow the units for one block, or a tie, to shrink exactly; least first."""
    block = group[-1]
    first: EquivalenceError | None = None
    for places in chain([[]], argument_sets(model, block, _holders(block), inputs)):
        cut = tuple((path.removeprefix(block.owner), name, dim, entries) for path, name, dim, entries in places)

        def settled(attributes: tuple[Attribute, ...], cut: tuple[Place, ...] = cut) -> _Settled:
            return _Settled(tuple((one.module.removeprefix(block.owner), one.name) for one in attributes), cut)

        def failure(attributes: tuple[Attribute, ...]) -> EquivalenceError | None:
            members = [settled(attributes).of(model, one) for one in group]
            # What comes after the consumer is left to the check of all blocks: this one is repeated.
            return _failure(model, members, kept, inputs, to_consumer=True)

        for attributes in islice(attribute_sets(model, block), LIKELIEST if cut else None):
            error = failure(attributes)
            if error is None:
                for attribute in attributes:
                    fewer = tuple(one for one in attributes if one != attribute)
                    # A width that the forward does not need may be that of something else.
                    if is_width(attribute) and failure(fewer) is None:
                        attributes = fewer
                return settled(attributes)
            first = first or error
    assert first is not None  # the empty set is always tried
    return first


def _attributes(model: nn.Module, block: Block, names: Sequence[tuple[str, str]]) -> tuple[Attribute, ...]:
    owner = block.owner
    found = {(one.module, one.name): one for group in candidates(model, block) for one in group}
    return tuple(found[owner + module, name] for module, name in names if (owner + module, name) in found)


def attribute_sets(model: nn.Module, block: Block) -> Iterator[tuple[Attribute, ...]]:
    """Sets of attributes to try for a block, likeliest first; the equivalence check has the last word.

    Candidates are integers on the modules that hold the block's tensors whose value is a whole multiple of the units
    (head counts), or at most the number of entries that the units own in one tensor (widths, likeliest where they are
    that number: others say how a fused projection is split). Head counts come first, so that a module that never
    reads its head count still states it correctly.

    Args:
        model: The model.
        block: The block; its `attributes` are ignored.

    Yields:
        Tuples of attributes, without repetition, the empty one among them.
    """
    counts, widths, configured, inner = candidates(model, block)
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


def candidates(model: nn.Module, block: Block) -> tuple[tuple[Attribute, ...], ...]:
    """Head counts and widths among the integers of the modules that hold the block; head counts in their config; and
    widths that forwards of them derive from their input.
    """
    owned = {piece.index.numel() for piece in block.slices}
    counts, widths, configured, inner = [], [], [], []
    heads = block.kind == "attention"
    for path in _holders(block):
        module = model.get_submodule(path)
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


def _holders(block: Block) -> list[str]:
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
