"""Walk the batches through the model, segment by segment, and collect the moments of its blocks for one variant.

Both `A` and `B` of `||A W - B_S V||` are the consumer's inputs at real tokens (padding excluded), and patches of them
for a convolution:

- `layer`: one forward in all, of the original model.
- `seq`: of the model as pruned so far, one layer forward a segment and one partial one a block.
- `asym`: targets from the original model, inputs from the model as pruned so far; two streams. The targets of a
  segment's blocks are held while it is pruned; where a pass before has kept them all, the original does not run.
- `residual`: as `asym`, for the sum of the consumer's output and of what the model adds to it (`additions`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import torch

from ..blocks import Block
from ..data.batches import Samples
from ..models.offload import loaded
from ..runs.processes import add_up, own_share
from ..runs.store import Store
from ..surgery.edits import Edit, kept_columns, taken_back
from .additions import Addition, find_additions
from .block_moments import BlockMoments
from .endings import Ending, Shell
from .observers import Hooks, Observer, PairedObserver, ResidualObserver, Targets
from .segments import Plan, Segment
from .stream import Rest, Stream


class Walk:
    """One pass over the model, of which each segment is started, observed and finished (variant `layer`).

    The model runs as it was before the walk: all of a segment's blocks are observed at once, when it is started.

    Args:
        samples: The batches, and their model, in eval mode.
        plan: The segments, holding exactly the blocks to prune.
        owners: By block name, the process that gets the block's moments; each runs its share of the batches.
        store: Where the state after each segment is kept.

    Attributes:
        independent: Whether what one block reads depends on no other block of the walk.
    """

    independent = True
    _of_original = "current"  # the stream that the model runs in as it was

    def __init__(self, samples: Samples, plan: Plan, owners: Mapping[str, int], store: Store | None = None) -> None:
        self.samples, self.plan, self.owners, self.store = samples, plan, owners, store or Store()
        self.current = self._stream("current")
        self.streams = {"current": self.current}
        fitted, held_out = len(samples.fit), len(samples.held_out)
        self._shares = [*own_share(fitted), *(fitted + index for index in own_share(held_out))]
        self._observers: dict[str, Observer] = {}

    def _stream(self, name: str) -> Stream:
        return Stream(self.samples, self.plan, self.store.part(name))

    def resume(self) -> Sequence[Segment]:
        """Go on behind the last segment that every process has finished; returns those that are finished."""
        position = self.store.finished()
        if position:
            kept = self.store.resume(position)
            for name, stream in self.streams.items():
                stream.resume(position, kept[name])
        return self.plan.segments[:position]

    @property
    def left(self) -> Sequence[Segment]:
        """The segments that come."""
        return self.plan.segments[self.current.position :]

    def start(self, segment: Segment) -> None:
        """Observe all blocks of the segment that comes.

        Raises:
            ValueError: a block's inputs hold NaN or inf; the message names the block and the samples.
        """
        self._watch(segment)
        observers = list(self._observers.values())
        with loaded(self.samples.model.get_submodule(segment.path)):
            self._run(self.current, observers, [observer.hooks() for observer in observers])
        self.current.step()

    def moments(
        self, blocks: Iterable[Block], kept: Mapping[str, torch.Tensor] | None = None
    ) -> dict[str, BlockMoments]:
        """By name, moments of blocks of the segment that was started, which read nothing of one another.

        They are held no longer here. Those of blocks that other processes own are parts of sums.

        Args:
            blocks: Of the segment.
            kept: By name of blocks before them in the segment, the units that they keep, `(k,)` int64.

        Raises:
            ValueError: as `start`.
        """
        return {block.name: self._added_up(self._observers.pop(block.name)) for block in blocks}

    def finish(self, segment: Segment, kept: Mapping[str, torch.Tensor] | None = None) -> None:
        """Go on to the next segment; the blocks of this one are as they stay.

        Args:
            segment: That was started.
            kept: By name of a block, the units that it keeps, `(k,)` int64, where that is known.
        """
        self._commit()

    def rest(self) -> Rest | None:
        """What is left of the original's forwards once all segments are finished, where that is known.

        It is to be asked for once, by who needs the walk no longer.
        """
        stream, fitted = self.streams.get(self._of_original), len(self.samples.fit)
        return None if stream is None else Rest.of(stream, [index for index in self._shares if index >= fitted])

    def _watch(self, segment: Segment) -> None:
        self._observers = {
            block.name: self._observer(block, calls)
            for block, calls in zip(segment.blocks, segment.calls, strict=True)
        }

    @cached_property
    def _additions(self) -> dict[str, Addition]:
        """Where sums are, by block name."""
        return find_additions(self.samples, self.plan)

    def _normed(self, block: Block) -> Addition | None:
        """Where a block's output is added to what goes through a norm."""
        addition = self._additions.get(block.name)
        return addition if addition is not None and addition.normed else None

    def _observer(self, block: Block, calls: int) -> Observer:
        return Observer(self.samples, block, calls, self._normed(block), ends=not self.independent)

    def _run(
        self,
        stream: Stream,
        observers: Sequence[Observer],
        hooks: Sequence[tuple[Hooks, Hooks]],
        stop_at: str | None = None,
        indices: Sequence[int] | None = None,
        known: Callable[[int], Mapping[str, Callable[[], Any]]] | None = None,
    ) -> None:
        """Run the stream's segment on this process's batches, or on some of them, under the eyes of observers.

        What is `known` of a batch is as `Stream.run` has it.
        """
        inputs, outputs = ([hook for some in hooks for hook in some[side]] for side in range(2))
        for index in self._shares if indices is None else indices:
            for observer in observers:
                observer.start(index)
            made = None if known is None else known(index)
            stream.run(index, inputs=inputs, outputs=outputs, stop_at=stop_at, known=made)

    def _added_up(self, observer: Observer) -> BlockMoments:
        moments = observer.moments
        for accumulator in (*moments.folds, moments.held_out):
            add_up(accumulator, self.owners[observer.block.name])
        return moments

    def _commit(self) -> None:
        self.store.commit(self.current.position, {name: stream.kept for name, stream in self.streams.items()})


class SurveyWalk(Walk):
    """One pass over the original model before it is known what its blocks lose.

    Args:
        samples, plan, owners: As of `Walk`.
        looked_at: Names of the blocks whose moments are collected.
        fitted: Of how many of the batches to fit on, if not of all batches, held-out ones among them.
        targets: Where what all blocks put out on all batches is kept, if it is.
        variant: Of the walk that will ask for it: `"asym"` or `"residual"`.
        most: Bytes that it may come to. It is let go of as soon as it is foreseen to be more.

    Attributes:
        targets: As long as they are kept.
    """

    def __init__(
        self,
        samples: Samples,
        plan: Plan,
        owners: Mapping[str, int],
        *,
        looked_at: Collection[str],
        fitted: int | None,
        targets: Targets | None = None,
        variant: str = "residual",
        most: int = 0,
    ) -> None:
        super().__init__(samples, plan, owners)
        self.targets, self._looked_at, self._variant, self._most = targets, looked_at, variant, most
        self._few = [index for index in self._shares if fitted is None or index < fitted]
        self._others = [index for index in self._shares if index not in self._few]

    def start(self, segment: Segment) -> None:
        self._watch(segment)
        observers = list(self._observers.values())
        noting = [] if self.targets is None else [self._noting(*of) for of in self._calls(segment)]
        hooks = [observer.hooks() for observer in observers]
        to_note = [observer.target_hooks() for observer in noting]
        with loaded(self.samples.model.get_submodule(segment.path)):
            self._run(self.current, [*observers, *noting], [*hooks, *to_note], indices=self._few)
            if noting:
                self._run(self.current, noting, to_note, indices=self._others)
        self.current.step()
        if self.targets is not None and self._foreseen() > self._most:
            self.targets = None

    def _calls(self, segment: Segment) -> Iterable[tuple[Block, int]]:
        return zip(segment.blocks, segment.calls, strict=True)

    def _watch(self, segment: Segment) -> None:
        few = [(block, calls) for block, calls in self._calls(segment) if block.name in self._looked_at]
        self._observers = {block.name: self._observer(block, calls) for block, calls in few}

    def _noting(self, block: Block, calls: int) -> PairedObserver:
        addition = self._additions.get(block.name) if self._variant == "residual" else None
        if addition is None:
            return PairedObserver(self.samples, block, calls, targets=self.targets)  # type: ignore[arg-type]
        return ResidualObserver(self.samples, block, calls, addition, targets=self.targets)  # type: ignore[arg-type]

    def _foreseen(self) -> float:
        """Bytes of the targets of all blocks, if those to come have as many as those that came."""
        blocks = sum(len(segment.blocks) for segment in self.plan.segments)
        come = sum(len(segment.blocks) for segment in self.plan.segments[: self.current.position])
        return self.targets.size * blocks / come  # type: ignore[union-attr]


class SequentialWalk(Walk):
    """Each block is observed in the model as pruned so far (variant `seq`)."""

    independent = False
    _of_original = "original"  # which there is where targets are

    def start(self, segment: Segment) -> None:
        self._watch(segment)
        *others, last = (self._observers[block.name] for block in segment.blocks)
        for observer in others:
            observer.shell = Shell.of(observer.consumer, observer.block, segment, observer.calls)
        self._shells = [(observer.block, observer.shell) for observer in others if observer.shell is not None]
        self._ending: Ending | None = None
        if segment is not self.plan.segments[-1]:
            self._ending = last.ending = Ending.of(last.consumer, last.addition, segment.path, last.calls)

    def moments(
        self, blocks: Iterable[Block], kept: Mapping[str, torch.Tensor] | None = None
    ) -> dict[str, BlockMoments]:
        observers = [self._observers[block.name] for block in blocks]
        stop_at = None if observers[0].stops else observers[-1].block.consumer
        hooks = [observer.hooks() for observer in observers]
        self._run(self.current, observers, hooks, stop_at, known=partial(self._at_hand, kept or {}))
        return super().moments([observer.block for observer in observers])

    def finish(self, segment: Segment, kept: Mapping[str, torch.Tensor] | None = None) -> None:
        kept = kept or {}
        if segment is not self.plan.segments[-1]:  # nothing reads what the last one puts out
            last = segment.blocks[-1]
            columns = kept_columns(last, kept[last.name]) if last.name in kept else None
            again = []
            for index in self._shares:
                if self._ending is None or columns is None or not self._ending.knows(index, columns):
                    again.append(index)
                else:
                    self.current.put(index, self._ending.output(index, columns))
            self._run(self.current, [], [], indices=again, known=partial(self._at_hand, kept))
        self._ending, self._shells = None, []
        self.current.step()
        self._commit()

    def _at_hand(self, kept: Mapping[str, torch.Tensor], index: int) -> Mapping[str, Callable[[], Any]]:
        """Of a batch, what need not run again of what is around blocks that are pruned."""
        known: dict[str, Callable[[], Any]] = {}
        for block, shell in self._shells:
            if block.name in kept:
                known |= shell.outputs(index, kept_columns(block, kept[block.name]))
        return known


class PairedWalk(SequentialWalk):
    """Two streams: targets come from the original model, inputs from the model as pruned so far (variant `asym`).

    Args:
        samples, plan, owners, store: As of `Walk`.
        beforehand: Edits of blocks outside of the plan, which are taken back for the original.
        targets: All of them, where they are known: the original does not run again.
    """

    def __init__(
        self,
        samples: Samples,
        plan: Plan,
        owners: Mapping[str, int],
        store: Store | None = None,
        *,
        beforehand: Mapping[str, Edit],
        targets: Targets | None = None,
    ) -> None:
        super().__init__(samples, plan, owners, store)
        self._beforehand, self._known = dict(beforehand), targets
        if targets is None:
            self.original = self.streams["original"] = self._stream("original")

    def start(self, segment: Segment) -> None:
        self._targets = self._known or Targets(self.store.part("targets"))
        super().start(segment)
        if self._known is not None:
            return
        observers: list[Any] = list(self._observers.values())
        # None of the segment's blocks is shrunk yet: one pass gives the targets of all.
        with taken_back(self._beforehand), loaded(self.samples.model.get_submodule(segment.path)):
            self._run(self.original, observers, [observer.target_hooks() for observer in observers])
        self.original.step()

    def _observer(self, block: Block, calls: int) -> Observer:
        return PairedObserver(self.samples, block, calls, self._normed(block), ends=True, targets=self._targets)


class ResidualWalk(PairedWalk):
    """As `PairedWalk`, for the sums that outputs go into (variant `residual`)."""

    def _observer(self, block: Block, calls: int) -> Observer:
        addition = self._additions.get(block.name)
        if addition is None:
            return super()._observer(block, calls)
        return ResidualObserver(self.samples, block, calls, addition, ends=True, targets=self._targets)


class StoredWalk:
    """Blocks whose moments are at hand: there is one segment of all of them, and nothing runs.

    Args:
        stored: By name, the moments in the process that owns the block.
        blocks: In forward order.
    """

    independent = True

    def __init__(self, stored: Mapping[str, BlockMoments], blocks: Sequence[Block]) -> None:
        self.stored = stored
        self.left = [Segment("", tuple(blocks), (1,) * len(blocks))]

    def resume(self) -> Sequence[Segment]:
        return ()

    def start(self, segment: Segment) -> None:
        """Nothing is left to observe."""

    def moments(
        self, blocks: Iterable[Block], kept: Mapping[str, torch.Tensor] | None = None
    ) -> dict[str, BlockMoments]:
        return {block.name: self.stored[block.name] for block in blocks if block.name in self.stored}

    def finish(self, segment: Segment, kept: Mapping[str, torch.Tensor] | None = None) -> None:
        """There is no other segment."""

    def rest(self) -> None:
        """Nothing has run."""


def walk(
    variant: str,
    samples: Samples,
    plan: Plan,
    owners: Mapping[str, int],
    *,
    beforehand: Mapping[str, Edit],
    store: Store | None = None,
    targets: Targets | None = None,
) -> Walk:
    """The walk of a variant: `"layer"`, `"seq"`, `"asym"` or `"residual"`; arguments are those of `PairedWalk`."""
    if variant == "layer":
        return Walk(samples, plan, owners, store)
    if variant == "seq":
        return SequentialWalk(samples, plan, owners, store)
    kind = PairedWalk if variant == "asym" else ResidualWalk
    return kind(samples, plan, owners, store, beforehand=beforehand, targets=targets)
