"""Collect the moments of every block in forward order, for each of the paper's variants."""

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from accelerate.utils.memory import should_reduce_batch_size
from torch import nn

from .advance import Plan, Stream
from .blocks import Block, by_stack
from .calibration import CalibrationSet
from .durable import read_objects, write_json, write_objects
from .experts import routed_tokens
from .linears import feature_axis, input_rows, matrix_shape, output_positions, output_rows
from .moments import MomentAccumulator, Moments, combine, unseen
from .offload import device_of, loaded
from .processes import add_up, own_share
from .surgery import Edit, taken_back

FOLDS = 2

_STATE = "state.json"


@dataclass(frozen=True)
class BlockMoments:
    """Sums of second moments of one block.

    Args:
        folds: Of the calibration batches, split by the parity of their index; one if there is one batch.
        held_out: Of the held-out batches.
    """

    folds: tuple[MomentAccumulator, ...]
    held_out: MomentAccumulator

    @property
    def rows(self) -> int:
        """Rows of the calibration batches."""
        return sum(fold.rows for fold in self.folds)

    @property
    def device(self) -> torch.device:
        """Where the sums are."""
        return self.held_out.device

    def to(self, device: torch.device | str) -> "BlockMoments":
        """The same sums on a device."""
        return BlockMoments(tuple(fold.to(device) for fold in self.folds), self.held_out.to(device))

    def of_folds(self, W: torch.Tensor) -> list[Moments]:
        """The moments of each fold; a fold that sends no token to an expert knows nothing but its weights.

        Args:
            W: `(n, m)`, the consumer's weight, inputs by outputs.
        """
        # Of a single row, centred moments are zero.
        seen = [fold.moments(W) for fold in self.folds if fold.rows > fold.intercept]
        return seen + [unseen(W, seen, self.held_out.intercept)] * (len(self.folds) - len(seen))

    def of_held_out(self, W: torch.Tensor) -> Moments:
        """The moments of the held-out rows; of those fitted on for an expert that gets none of the held-out ones.

        In float32: they are reported on, in a few digits.
        """
        held_out = self.held_out
        if held_out.rows > held_out.intercept:
            return held_out.moments(W, torch.float32)
        return combine(self.of_folds(W))


def collect(
    model: nn.Module,
    plan: Plan,
    calibration: CalibrationSet,
    variant: str,
    edits: Mapping[str, Edit],
    advanced: Callable[[], None] = lambda: None,
    folder: Path | None = None,
    owners: Mapping[str, int] | None = None,
) -> Iterator[tuple[Block, BlockMoments]]:
    """Yield each block with its moments; the caller shrinks the block before it asks for the next one.

    Both `A` and `B` of `||A W - B_S V||` are the consumer's inputs at real tokens (padding excluded), and patches of
    them for a convolution:

    - `layer`: one forward in all, of the original model.
    - `seq`: of the model as pruned so far, one layer forward a segment and one partial one a block.
    - `asym`: targets from the original model, inputs from the model as pruned so far; two streams. The targets of a
      segment's blocks are held while it is pruned.

    Args:
        model: In eval mode; original weights at the start.
        plan: The segments, holding exactly the blocks to prune.
        calibration: The batches.
        variant: `"layer"`, `"seq"` or `"asym"`.
        edits: By block name, the edits that the caller has made; read, while the generator is suspended they grow.
            Those of blocks outside the plan are made beforehand and taken back for the original stream of `asym`.
        advanced: Called after each segment (for a progress bar).
        folder: Where the state after each segment is made durable; the walk goes on behind the last one that is
            (`finished_segments`), whose blocks the caller has shrunk. Nothing is written without one.
        owners: By block name, the process that gets the block's moments, when several run their shares of the batches;
            without, each process runs all batches.

    Raises:
        ValueError: a block's inputs hold NaN or inf; the message names the block and the samples.
    """
    batches = [*calibration.fit, *calibration.held_out]
    names = ("current", "original") if variant == "asym" else ("current",)
    streams = {name: Stream(model, plan, batches, _made(folder, name)) for name in names}
    start = 0 if folder is None else _resume(folder, streams)
    current, original = streams["current"], streams.get("original")
    finished = {b.name for s in plan.segments[:start] for b in s.blocks}
    beforehand = {name: edit for name, edit in edits.items() if name not in finished}
    indices: Sequence[int] = range(len(batches))
    if owners is not None:
        fitted = len(calibration.fit)
        indices = [*own_share(fitted), *(fitted + index for index in own_share(len(calibration.held_out)))]
    for segment in plan.segments[start:]:
        layer = model.get_submodule(segment.path)
        targets = None if original is None else _Targets(_made(folder, "targets"))
        taps = {block.name: _Tap(model, block, calibration, targets) for block in segment.blocks}
        if variant == "layer":
            with loaded(layer):
                for index in indices:
                    for tap in taps.values():
                        tap.start(index)
                    current.run(index, inputs={tap.block.consumer: tap.add for tap in taps.values()})
            current.step()
            for block in segment.blocks:  # a block's moments are gone when the next one is solved
                yield block, _added_up(taps.pop(block.name), owners)
        else:
            if original is not None:
                # None of the segment's blocks is shrunk yet: one pass gives the targets of all.
                with taken_back(beforehand), loaded(layer):
                    for index in indices:
                        for tap in taps.values():
                            tap.start(index)
                        original.run(index, outputs={tap.block.consumer: tap.add_target for tap in taps.values()})
                original.step()
            for group in by_stack(segment.blocks):  # experts of one layer do not read one another
                for index in indices:
                    for block in group:
                        taps[block.name].start(index)
                    inputs = {block.consumer: taps[block.name].add for block in group}
                    current.run(index, inputs=inputs, stop_at=group[-1].consumer)
                for block in group:
                    yield block, _added_up(taps.pop(block.name), owners)
            for index in indices:
                current.run(index)
            current.step()
        if folder is not None:
            _commit(folder, streams)
        advanced()


def finished_segments(folder: Path | None) -> int:
    """How many segments of the plan are finished, with all of their blocks, in a folder of `collect`."""
    if folder is None:
        return 0
    path = folder / _STATE
    return json.loads(path.read_text())["position"] if path.exists() else 0


def _made(folder: Path | None, name: str) -> Path | None:
    if folder is None:
        return None
    (folder / name).mkdir(parents=True, exist_ok=True)
    return folder / name


def _resume(folder: Path, streams: Mapping[str, Stream]) -> int:
    position = finished_segments(folder)
    if position:
        files = json.loads((folder / _STATE).read_text())["files"]
        for name, stream in streams.items():
            stream.resume(position, files[name])
    return position


def _commit(folder: Path, streams: Mapping[str, Stream]) -> None:
    """One rename makes the segment finished for all streams; then what only earlier ones needed can go."""
    files = {name: stream.files for name, stream in streams.items()}
    write_json(folder / _STATE, {"position": streams["current"].position, "files": files})
    for name, stored in files.items():
        needed = {file for batch in stored for file in batch.values()}
        for path in (folder / name).iterdir():
            if path.name not in needed:
                path.unlink()


class _Targets:
    """What consumers put out in the original model, until the pruned one has come as far; in files if asked for.

    Args:
        folder: For the files.
    """

    def __init__(self, folder: Path | None):
        self.folder = folder
        self._waiting: dict[tuple[str, int], list[Any]] = defaultdict(list)

    def put(self, block: str, index: int, target: tuple[torch.Tensor, torch.Tensor | None]) -> None:
        """Keep one call's target of batch `index`."""
        waiting = self._waiting[block, index]
        if self.folder is not None:
            path = self.folder / f"{block}-{index}-{len(waiting)}.pt"
            write_objects(path, target)
            waiting.append(path)
        else:
            waiting.append(target)

    def pop(self, block: str, index: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The targets in the order in which they came."""
        target = self._waiting[block, index].pop(0)
        if self.folder is None:
            return target
        read = read_objects(target)
        target.unlink()  # what is mapped into memory stays until it is let go of
        return read


class _Tap:
    """Feeds the rows that reach one consumer into the accumulators of the batch's fold."""

    def __init__(self, model: nn.Module, block: Block, calibration: CalibrationSet, targets: _Targets | None):
        self.block, self.calibration = block, calibration
        self.consumer: Any = model.get_submodule(block.consumer)
        self._bias = None if targets is None else getattr(self.consumer, "bias", None)
        self._targets = targets
        self._accumulators: BlockMoments | None = None

    @property
    def moments(self) -> BlockMoments:
        """Of the rows seen so far; memory is taken when they are first asked for."""
        if self._accumulators is None:
            n, m = matrix_shape(self.consumer)
            targets = None if self._targets is None else m
            intercept = getattr(self.consumer, "bias", None) is not None
            count, device = min(FOLDS, len(self.calibration.fit)) + 1, device_of(self.consumer.weight)
            try:
                made = [_accumulator(n, targets, intercept, device) for _ in range(count)]
            except RuntimeError as error:
                if not should_reduce_batch_size(error):
                    raise
                made = [_accumulator(n, targets, intercept, torch.device("cpu")) for _ in range(count)]
            self._accumulators = BlockMoments(tuple(made[:-1]), made[-1])
        return self._accumulators

    def start(self, index: int) -> None:
        """The rows to come belong to batch `index` (calibration batches first, held-out ones behind)."""
        self._index, self._fitted = index, len(self.calibration.fit)

    def add_target(self, output: torch.Tensor) -> None:
        rows = self._real(output_rows(self.consumer, output), output.movedim(feature_axis(self.consumer), -1).shape)
        rows = rows if self._bias is None else rows - self._bias.detach()
        self._targets.put(self.block.name, self._index, (rows, self._tokens()))  # type: ignore[union-attr]

    def add(self, inputs: torch.Tensor) -> None:
        targets, sent = (None, None)
        if self._targets is not None:
            targets, sent = send_to_device(self._targets.pop(self.block.name, self._index), inputs.device)
        fitted = self._index < self._fitted
        into = self.moments.folds[self._index % len(self.moments.folds)] if fitted else self.moments.held_out
        start = done = 0
        positions = output_positions(self.consumer, inputs.shape)
        for part in input_rows(self.consumer, inputs):
            rows = self._real(part, (*positions, part.shape[1]), start)
            start += len(part)
            target = None if targets is None else targets[done : done + len(rows)]
            done += len(rows)
            if not torch.isfinite(rows.sum(dtype=torch.float64)):  # what is not finite stays so in a sum
                what = f"calibration batch {self._index}" if fitted else "a held-out batch"
                raise ValueError(
                    f"Block {self.block.name}: the input of {self.block.consumer} holds NaN or inf in {what}"
                    f"{self._culprits(inputs)}. Check these samples, or load the model in float32 or bfloat16."
                )
            if target is not None and sent is not None and (tokens := self._tokens()) is not None:
                # Routers of the two models may differ: only tokens that both send to this expert tell it what to do.
                rows, target = rows[torch.isin(tokens, sent)], targets[torch.isin(sent, tokens)]  # type: ignore[index]
            into.update(rows, target)

    def _tokens(self) -> torch.Tensor | None:
        """Which tokens the rows of an expert are, in increasing order; `None` where all tokens pass."""
        routed = routed_tokens(self.calibration.model, self.block.consumer)
        return None if routed is None else self._real(routed[1], (len(routed[1]), 1))

    def _culprits(self, inputs: torch.Tensor) -> str:
        """Which samples of the batch are not finite, where the first dimension counts samples."""
        if inputs.ndim < 3:
            return ""
        bad = (~torch.isfinite(inputs)).flatten(1).any(1).nonzero().flatten().tolist()
        return f", samples {bad} of the batch"

    def _real(self, rows: torch.Tensor, shape: Sequence[int], start: int = 0) -> torch.Tensor:
        """Those of some rows, the first of which is row `start` of a tensor of `shape`, that are no padding."""
        mask = self.calibration.mask(shape, self._index, self.block.consumer)
        return rows if mask is None else rows[mask[start : start + len(rows)].to(rows.device)]


def _accumulator(n: int, m: int | None, intercept: bool, device: torch.device) -> MomentAccumulator:
    return MomentAccumulator(n, m, intercept=intercept, device=device)


def _added_up(tap: _Tap, owners: Mapping[str, int] | None) -> BlockMoments:
    if owners is not None:
        for accumulator in (*tap.moments.folds, tap.moments.held_out):
            add_up(accumulator, owners[tap.block.name])
    return tap.moments
