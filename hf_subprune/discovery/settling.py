"""Settle what must follow the number of units for a block to shrink exactly, if it does: attributes and arguments."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice

import torch

from ..blocks import Attribute, Block
from ..models.paths import Modules
from ..surgery.verification import EquivalenceError
from .arguments import Call, Place, argument, argument_sets
from .attributes import attribute_sets, attributes_named, holders, is_width
from .ties import alike, by_choice, tied_together

LIKELIEST = 16
"""Sets of attributes that are tried with each set of arguments."""


@dataclass(frozen=True, eq=False)
class Trials:
    """What a model is tried on while attributes are settled.

    Args:
        modules: Of the model.
        failure: Given blocks and the units that each keeps by name, why they do not shrink exactly, or `None`; with
            `to_consumer=True`, up to the consumer of the last of them.
        calls: Given the path of a module, all of its calls in a forward.
    """

    modules: Modules
    failure: Callable[..., EquivalenceError | None]
    calls: Callable[[str], list[Call]]


@dataclass(frozen=True)
class _Settled:
    """What must follow the units of blocks of one class, by module path within a block's owner.

    Args:
        names: Of attributes, with their modules.
        places: Of arguments that are cut.
    """

    names: tuple[tuple[str, str], ...]
    places: tuple[Place, ...] = ()

    def of(self, modules: Modules, block: Block) -> Block:
        """A block of this class with its own attributes and arguments."""
        places = [(block.owner + path, name, dim, entries) for path, name, dim, entries in self.places]
        cut = tuple(argument(modules[place[0]], block, place) for place in places)
        return replace(block, attributes=attributes_named(modules, block, self.names), arguments=cut)


def settle(trials: Trials, blocks: list[Block]) -> tuple[list[Block], list[tuple[Block, str]]]:
    """Settle each block's attributes and keep the blocks that shrink exactly.

    Layers of one class take the same attributes: they are searched for on the first and confirmed on all at once.

    Args:
        trials: On the model that the blocks are of.
        blocks: Candidates in the order of the forward, with unique names; their `attributes` are ignored.

    Returns:
        The blocks that shrink exactly, with their attributes, and the others with the reason.
    """
    settling = _Settling(trials, blocks)
    order = {block.name: i for i, block in enumerate(blocks)}
    exact, inexact = settling.by_class(blocks)
    exact.sort(key=lambda block: order[block.name])
    confirmed, failed = settling.confirmed(exact)
    return confirmed, inexact + failed


class _Settling:
    """The units that blocks keep while they are tried, and what follows from the trials.

    Attributes:
        kept: By name of a block, `(k,)` int64; the same for blocks once they are tied.
    """

    def __init__(self, trials: Trials, blocks: list[Block]) -> None:
        self.trials = trials
        self.number = numbers(by_choice(blocks))
        self.kept = {
            block.name: _half(block, i, self.number[block.name])
            for i, tie in enumerate(by_choice(blocks))
            for block in tie
        }

    def by_class(self, blocks: list[Block]) -> tuple[list[Block], list[tuple[Block, str]]]:
        """Blocks with what was found for the first of their class; the others with the reason why nothing was."""
        settled: dict[tuple, _Settled | EquivalenceError] = {}
        exact: list[Block] = []
        inexact: list[tuple[Block, str]] = []
        for tie in by_choice(blocks):
            key = tuple(self._signature(block) for block in tie)
            if key not in settled:
                settled[key] = self._search(tie)
            found = settled[key]
            if isinstance(found, EquivalenceError):
                inexact += [(block, found.reason) for block in tie]
            else:
                exact += [found.of(self.trials.modules, block) for block in tie]
        return exact, inexact

    def confirmed(self, blocks: list[Block]) -> tuple[list[Block], list[tuple[Block, str]]]:
        """Blocks that shrink exactly all at once, and the others with the reason.

        As a rule one check of all blocks. If it fails, those like the ones at fault keep the same units; if that is
        not it, each is checked alone, and those that pass once more.
        """
        checks = [blocks]
        if any(block.units < 4 for block in blocks):
            # A single unit left of a few fits several by broadcasting: leave every other block whole.
            checks.append([block for block in blocks if self.number[block.name] % 2])
        errors = (error for some in checks if some and (error := self._failure(some)) is not None)
        error = next(errors, None)
        if error is None:
            return blocks, []
        together = self._together(blocks, error)
        return self._one_by_one(blocks) if together is None else (together, [])

    def _one_by_one(self, blocks: list[Block]) -> tuple[list[Block], list[tuple[Block, str]]]:
        alone = [(tie, self._failure(tie)) for tie in by_choice(blocks)]
        failed = {block.name: error.reason for tie, error in alone if error is not None for block in tie}
        fitting = self._tied(blocks, failed)
        for tie, _ in alone:
            if tie[0].name in failed.keys() - fitting.keys():
                fitting |= self._apart(tie)
        inexact = [(block, failed[block.name]) for block in blocks if block.name in failed.keys() - fitting.keys()]
        exact = [
            fitting.get(block.name, block) for block in blocks if block.name in fitting or block.name not in failed
        ]
        while exact and (error := self._failure(exact)) is not None:
            culprit = next(tie for tie in by_choice(exact) if error.block in {block.name for block in tie})
            inexact += [(block, error.reason) for block in culprit]
            exact = [block for block in exact if block not in culprit]
        return exact, inexact

    def _together(self, blocks: list[Block], error: EquivalenceError | None) -> list[Block] | None:
        """The blocks, those like the ones at fault tied, if all of them shrink exactly so."""
        same = dict(self.kept)
        while error is not None:
            culprit = next(block for block in blocks if block.name == error.block)
            group = [block for block in blocks if block.tie is None and alike(block) == alike(culprit)]
            if culprit.tie is not None or len(group) == 1:
                return None
            tied = {block.name: block for block in tied_together(group)}
            same |= dict.fromkeys(tied, self.kept[group[0].name])
            blocks = [tied.get(block.name, block) for block in blocks]
            error = self.trials.failure(blocks, same)
        self.kept = same
        return blocks

    def _tied(self, blocks: list[Block], failed: Collection[str]) -> dict[str, Block]:
        """By name, blocks some of which fail alone but that shrink exactly when all keep the same units.

        Each of them shrinks exactly up to its own consumer; it is what the first of them hands on to the others that
        has as many units as it.
        """
        groups: dict[tuple, list[Block]] = {}
        for block in blocks:
            if block.tie is None:
                groups.setdefault(alike(block), []).append(block)
        exact: dict[str, Block] = {}
        for group in groups.values():
            if len(group) > 1 and any(block.name in failed for block in group):
                tied, same = tied_together(group), {block.name: self.kept[group[0].name] for block in group}
                if self.trials.failure(tied, same) is None:
                    self.kept |= same
                    exact |= {block.name: block for block in tied}
        return exact

    def _apart(self, tie: Sequence[Block]) -> dict[str, Block]:
        """By name, a block or a tie that shrinks exactly with what others of its class do not take, if it does."""
        found = self._search(tie)
        if isinstance(found, _Settled):
            tie = [found.of(self.trials.modules, block) for block in tie]
            if self._failure(tie) is None:
                return {block.name: block for block in tie}
        return {}

    def _search(self, tie: Sequence[Block]) -> _Settled | EquivalenceError:
        """What must follow the units for one block, or a tie, to shrink exactly; least first."""
        block, modules = tie[-1], self.trials.modules
        first: EquivalenceError | None = None
        for places in chain([[]], argument_sets(modules, block, holders(block), self.trials.calls)):
            cut = tuple((path.removeprefix(block.owner), name, dim, entries) for path, name, dim, entries in places)

            def settled(attributes: tuple[Attribute, ...], cut: tuple[Place, ...] = cut) -> _Settled:
                return _Settled(tuple((one.module.removeprefix(block.owner), one.name) for one in attributes), cut)

            def failure(attributes: tuple[Attribute, ...]) -> EquivalenceError | None:
                members = [settled(attributes).of(modules, one) for one in tie]
                # What comes after the consumer is left to the check of all blocks: this one is repeated.
                return self._failure(members, to_consumer=True)

            for attributes in islice(attribute_sets(modules, block), LIKELIEST if cut else None):
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

    def _failure(self, blocks: Sequence[Block], to_consumer: bool = False) -> EquivalenceError | None:
        return self.trials.failure(blocks, self.kept, to_consumer=to_consumer)

    def _signature(self, block: Block) -> tuple:
        """Equal for blocks of one class in different layers."""
        owner = block.owner
        pieces = [(piece.tensor.removeprefix(owner), piece.dim, tuple(piece.index.shape)) for piece in block.slices]
        return (type(self.trials.modules[owner]), block.kind, tuple(block.columns.shape), *pieces)


def numbers(together: Iterable[Sequence[Block]]) -> dict[str, int]:
    """By name, how many blocks like it come before each block; those given together count as one."""
    numbers: dict[str, int] = {}
    seen: Counter[tuple] = Counter()
    for some in together:
        numbers |= {block.name: seen[alike(some[0])] for block in some}
        seen[alike(some[0])] += 1
    return numbers


def _half(block: Block, seed: int, number: int) -> torch.Tensor:
    """About half of each set's units, as many as `number` is even or odd: blocks of one class keep other numbers."""
    random = torch.Generator().manual_seed(seed)
    size = block.units // block.sets
    count = max(1, min(size - 1, size // 2 + number % 2))
    chosen = [start + torch.randperm(size, generator=random)[:count] for start in range(0, block.units, size)]
    return torch.cat(chosen).sort().values
