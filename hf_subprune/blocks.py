"""A prunable block: one consumer, the producers that feed it, and the units that can be removed from it."""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from fractions import Fraction
from itertools import takewhile
from typing import Literal

import torch

from .config import PruneConfig


@dataclass(frozen=True, eq=False)
class Slice:
    """Where the units of a block live along one dimension of one parameter or buffer.

    Args:
        tensor: Dotted path from the model, e.g. `"encoder.layer.0.intermediate.dense.weight"`.
        dim: Dimension along which units are removed.
        index: `(units, r)` int64; row `u` holds the entries along `dim` that unit `u` owns.
        shared: Whether the other blocks of the tie read these entries too (a bias table made once for all layers).
    """

    tensor: str
    dim: int
    index: torch.Tensor
    shared: bool = False


@dataclass(frozen=True)
class Attribute:
    """An integer attribute of a module that is proportional to the number of units kept.

    Args:
        module: Dotted path of the module (`""` is the model itself).
        name: Attribute name, e.g. `"num_heads"`; `"config.num_attention_heads"` is a value of the module's config,
            of which the module gets a copy of its own.
        before: Value with all units.
        per_unit: Value that each unit contributes; `before == per_unit * units`. A fraction where it counts the units
            of one set.
    """

    module: str
    name: str
    before: int
    per_unit: Fraction | int


@dataclass(frozen=True, eq=False)
class Argument:
    """An argument of a module's forward, made outside of it, with entries for every unit: it is cut to those kept.

    Args:
        module: Dotted path of the module.
        name: Of the argument, e.g. `"alibi"`.
        dim: Dimension along which its units lie.
        entries: Along that dimension with all units, before anything is cut.
        index: `(units, r)` int64; row `u` holds the entries, among those that are not cut, that unit `u` reads.
    """

    module: str
    name: str
    dim: int
    entries: int
    index: torch.Tensor


@dataclass(frozen=True)
class Bypass:
    """A module that is not run when a block keeps no unit, and returns what no units make.

    Args:
        module: Dotted path of the module.
        consumer: Path of the block's consumer within it, which then reads no features, so that its bias is all that it
            gives; `"."` where it is the consumer, whose own forward cannot read none; `""` where the consumer is
            outside and reads what the module returns.
        entries: Of the tuple that it returns: the output, and `None` for all others; 0 for the output alone.
    """

    module: str
    consumer: str
    entries: int


@dataclass(frozen=True, eq=False)
class Block:
    """One consumer linear, the producers whose output rows feed it, and its units.

    Args:
        name: Unique dotted name shown to users, e.g. `"encoder.layer.0.attention"`; `include`/`exclude` match it.
        kind: `"mlp"`, `"attention"`, or `"channels"` where the consumer is a convolution, or a producer is
            one whose output is flattened.
        consumer: Dotted path of the consumer module (`nn.Linear`, `Conv1D`, or a convolution).
        columns: `(units, c)` int64; row `u` holds the consumer's input columns that unit `u` owns. Those of a
            convolution are the entries of a patch: as many in a row for each channel as its kernel has.
        slices: Every tensor that shrinks with the units: the consumer's own columns, the producers' rows, biases.
        attributes: Integer attributes that must follow the number of units for the forward to stay correct.
        parameters_per_unit: Parameters that removing one unit frees, over all slices. A tensor that another block
            slices as well, along its other dimension, counts in equal parts for both: no less than that is freed.
        tie: Blocks of one tie read something of each unit that is made once for all of them, so that they can only
            keep the same units. It is written as a pattern of their names; `None` for a block on its own.
        stack: Blocks of one stack are the experts of one layer, stored in common tensors, so that they keep equally
            many units, each its own. Dotted path of the module that holds them; `None` for a block on its own.
        sets: Units come in this many sets of equal size, one set after the other, which keep equally many units each.
        queries: Under grouped-query attention, where a unit is a key/value head with all of its query heads: the same
            block with the query heads as units, in one set for each key/value head. Its keys and values stay.
        arguments: What the forward is given for each unit, such as ALiBi biases, and must be cut with them.
        removable: Whether it may keep no unit at all.
        bypasses: What is not run then; all else runs on no features.
    """

    name: str
    kind: str
    consumer: str
    columns: torch.Tensor
    slices: tuple[Slice, ...]
    attributes: tuple[Attribute, ...]
    parameters_per_unit: int
    tie: str | None = None
    stack: str | None = None
    sets: int = 1
    queries: "Block | None" = None
    arguments: tuple[Argument, ...] = ()
    removable: bool = False
    bypasses: tuple[Bypass, ...] = ()

    @property
    def owner(self) -> str:
        """Dotted path of the smallest module that holds all that is not shared, e.g. `"encoder.layer.0.attention"`."""
        holders = [piece.tensor.split(".")[:-2] for piece in self.slices if not piece.shared]
        shared = takewhile(lambda parts: len(set(parts)) == 1, zip(*holders, strict=False))
        return ".".join(parts[0] for parts in shared)

    @property
    def units(self) -> int:
        """Number of units."""
        return self.columns.shape[0]

    @property
    def parameters(self) -> int:
        """Parameters that belong to the block's units."""
        return self.units * self.parameters_per_unit

    def first(self, width: int) -> torch.Tensor:
        """`(width,)` int64, the first units: of each set equally many."""
        return torch.arange(self.units).view(self.sets, -1)[:, : width // self.sets].flatten()


@dataclass(frozen=True)
class Group:
    """Blocks that are decided on together.

    Args:
        blocks: In the order of the forward.
        share: What they must have in common: `"units"`, blocks of one tie, which all keep the same units; `"width"`,
            experts stored together, which keep equally many units, each its own; `None` for a block on its own.
    """

    blocks: tuple[Block, ...]
    share: Literal["units", "width"] | None

    @property
    def choices(self) -> tuple[tuple[Block, ...], ...]:
        """The blocks, those together for which one choice of units is made."""
        return (self.blocks,) if self.share == "units" else tuple((block,) for block in self.blocks)


def place_of(block: Block) -> tuple[str, str, int]:
    """The same for blocks at the same place of equal layers: the name without its numbers, kind and units."""
    return re.sub(r"\d+", "*", block.name), block.kind, block.units


def groups_of(blocks: Iterable[Block]) -> list[Group]:
    """The groups that blocks form, in the order of their first block."""
    together: dict[str | Block, list[Block]] = {}
    for block in blocks:
        together.setdefault(block.tie or block.stack or block, []).append(block)

    def share(first: Block) -> Literal["units", "width"] | None:
        return "units" if first.tie else "width" if first.stack else None

    return [Group(tuple(members), share(members[0])) for members in together.values()]


def parameters_per_unit(
    parameters: Mapping[str, torch.Tensor], slices: Iterable[Slice], blocks: Mapping[str, int] | None = None
) -> int:
    """Parameters that removing one unit frees.

    Args:
        parameters: Of the model, under each of their dotted paths; what else is sliced are buffers.
        slices: Of the block.
        blocks: In how many blocks a tensor counts; once if it is left out.
    """
    tensors = [(parameters[piece.tensor], piece) for piece in slices if piece.tensor in parameters]
    return sum(
        tensor.numel() // tensor.shape[piece.dim] * piece.index.shape[1] // (blocks or {}).get(piece.tensor, 1)
        for tensor, piece in tensors
    )


def counted_once(parameters: Mapping[str, torch.Tensor], blocks: Iterable[Block]) -> tuple[Block, ...]:
    """The blocks, with the entries of a tensor that several of them slice counted in equal parts.

    Args:
        parameters: Of the model, under each of their dotted paths.
        blocks: All that were found.
    """
    blocks = tuple(blocks)
    times = Counter(tensor for block in blocks for tensor in {piece.tensor for piece in block.slices})

    def counted(block: Block) -> Block:
        queries = None if block.queries is None else counted(block.queries)
        return replace(
            block, parameters_per_unit=parameters_per_unit(parameters, block.slices, times), queries=queries
        )

    return tuple(
        counted(block) if any(times[piece.tensor] > 1 for piece in block.slices) else block for block in blocks
    )


@dataclass(frozen=True)
class Refusal:
    """A candidate block that is left whole, and what the user can do about it.

    Args:
        name: Dotted path of the consumer, or the name that the block would have had.
        kind: As of a block; `"unknown"` where the input columns do not fall into units, and `"whole"` for what is
            never pruned: heads and projectors outside of the repeated layers, residual streams, low-rank pairs,
            attention of a single head.
        reason: What was found.
        advice: What the user can do.
    """

    name: str
    kind: str
    reason: str
    advice: str


@dataclass(frozen=True)
class Discovery:
    """What a model offers for pruning: `blocks` in the order of the forward, and `refusals`."""

    blocks: tuple[Block, ...]
    refusals: tuple[Refusal, ...]


def choose_blocks(blocks: Sequence[Block], refusals: Sequence[Refusal], config: PruneConfig) -> list[Block]:
    """The blocks that the config lets us prune.

    Raises:
        ValueError: a pattern matches nothing, a tie is chosen in part, or no block is left; the message lists what
            there is.
    """
    names = [b.name for b in blocks]
    for option in ("include", "exclude", "remove"):
        for pattern in getattr(config, option):
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ValueError(
                    f"`{option}` pattern {pattern!r} matches no block; the blocks are {', '.join(names)}."
                )
    chosen = [
        b
        for b in blocks
        if b.kind in config.units
        and (not config.include or any(fnmatchcase(b.name, p) for p in config.include))
        and not any(fnmatchcase(b.name, p) for p in config.exclude)
    ]
    for group in groups_of(blocks):
        part = [b.name for b in group.blocks if b in chosen]
        if 0 < len(part) < len(group.blocks):
            first, rest = group.blocks[0], [b.name for b in group.blocks if b not in chosen]
            must = f"{first.tie!r} must all keep the same units"
            if group.share == "width":
                must = f"of {first.stack!r} are stored together and must all keep equally many units"
            raise ValueError(
                f"Blocks {must}, but the config prunes {', '.join(part)} and not {', '.join(rest)}: `include` or "
                f"`exclude` all of them."
            )
    if not chosen:
        there = ", ".join(f"{b.name} ({b.kind})" for b in blocks) or "none"
        kinds = sorted({b.kind for b in blocks} - set(config.units))
        advice = f" Add {kinds} to `units` to prune these." if kinds else ""
        why = "".join(f"\n  {r.name}: {r.reason} {r.advice}" for r in refusals)
        raise ValueError(
            f"No prunable block is left: units={list(config.units)}, include={list(config.include)}, "
            f"exclude={list(config.exclude)}; prunable blocks found: {there}.{advice}{why}"
        )
    return chosen


def removed_blocks(blocks: Sequence[Block], config: PruneConfig) -> list[Block]:
    """Those of the blocks that the config lets keep no unit.

    Raises:
        ValueError: one of them cannot go.
    """
    gone = [b for b in blocks if any(fnmatchcase(b.name, pattern) for pattern in config.remove)]
    if staying := [b.name for b in gone if not b.removable]:
        raise ValueError(
            f"`remove` names {', '.join(staying)}, which must keep a unit (stored with others, or the model does not "
            f"compute the same without it): take it out of `remove`."
        )
    return gone


def some_of(names: Collection[str]) -> str:
    """The first three names, and how many more there are, for a message."""
    first, more = sorted(names)[:3], len(names) - 3
    return ", ".join(map(repr, first)) + (f" and {more} more" if more > 0 else "")
