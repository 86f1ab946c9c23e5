"""Collect the moments of every block in forward order, for each variant."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from torch import nn

from ..blocks import Block, by_stack
from ..config import TWO_STREAMS
from ..data.batches import Samples
from ..models.offload import loaded
from ..runs.durable import write_json
from ..runs.processes import add_up, from_all, own_share, processes
from ..surgery.edits import Edit, taken_back
from .additions import find_additions
from .block_moments import BlockMoments
from .observers import Hooks, Tap, Targets
from .segments import Plan
from .stream import Stream

_STATE = "state.json"


def collect(
    model: nn.Module,
    plan: Plan,
    calibration: Samples,
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
    - `residual`: as `asym`, for the sum of the consumer's output and of what the model adds to it (`residuals`): the
      target holds, besides, by how much the rest of that sum, as pruned so far, falls short of the original's.

    Args:
        model: In eval mode; original weights at the start.
        plan: The segments, holding exactly the blocks to prune.
        calibration: The batches.
        variant: `"layer"`, `"seq"`, `"asym"` or `"residual"`.
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
    names = ("current", "original") if variant in TWO_STREAMS else ("current",)
    streams = {name: Stream(model, plan, batches, _made(folder, name)) for name in names}
    start = 0 if folder is None else _resume(folder, streams)
    additions = find_additions(model, plan, calibration.probe) if variant == "residual" else {}
    current, original = streams["current"], streams.get("original")
    finished = {b.name for s in plan.segments[:start] for b in s.blocks}
    beforehand = {name: edit for name, edit in edits.items() if name not in finished}
    indices: Sequence[int] = range(len(batches))
    if owners is not None:
        fitted = len(calibration.fit)
        indices = [*own_share(fitted), *(fitted + index for index in own_share(len(calibration.held_out)))]
    for segment in plan.segments[start:]:
        layer = model.get_submodule(segment.path)
        targets = None if original is None else Targets(_made(folder, "targets"))
        taps = {
            block.name: Tap(model, block, calibration, targets, additions.get(block.name), calls)
            for block, calls in zip(segment.blocks, segment.calls, strict=True)
        }
        if variant == "layer":
            with loaded(layer):
                for index in indices:
                    for tap in taps.values():
                        tap.start(index)
                    current.run(index, inputs=[(tap.block.consumer, tap.add) for tap in taps.values()])
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
                        hooks = [tap.target_hooks() for tap in taps.values()]
                        original.run(
                            index, inputs=chain(*(i for i, _ in hooks)), outputs=chain(*(o for _, o in hooks))
                        )
                original.step()
            for group in by_stack(segment.blocks):  # experts of one layer do not read one another
                # A tap that watches an addition ends the forward itself.
                stop_at = None if group[0].name in additions else group[-1].consumer
                for index in indices:
                    for block in group:
                        taps[block.name].start(index)
                    inputs, outputs = _joined(taps[block.name].hooks() for block in group)
                    current.run(index, inputs=inputs, outputs=outputs, stop_at=stop_at)
                for block in group:
                    yield block, _added_up(taps.pop(block.name), owners)
            if segment is not plan.segments[-1]:  # nothing reads what the last one puts out
                for index in indices:
                    current.run(index)
            current.step()
        if folder is not None:
            _commit(folder, streams)
        advanced()


def finished_segments(folder: Path | None) -> int:
    """How many segments of the plan are finished in every process, with all blocks, in a folder of `collect`."""
    if folder is None:
        return 0
    return min(from_all(max((state["position"] for state in _states(folder)), default=0)))


def _joined(pairs: Iterable[tuple[Hooks, Hooks]]) -> tuple[Hooks, Hooks]:
    inputs, outputs = zip(*pairs, strict=True)
    return list(chain(*inputs)), list(chain(*outputs))


def _made(folder: Path | None, name: str) -> Path | None:
    if folder is None:
        return None
    (folder / name).mkdir(parents=True, exist_ok=True)
    return folder / name


def _resume(folder: Path, streams: Mapping[str, Stream]) -> int:
    position = finished_segments(folder)
    if position:
        files = next(state["files"] for state in _states(folder) if state["position"] == position)
        for name, stream in streams.items():
            stream.resume(position, files[name])
    return position


def _states(folder: Path) -> list[dict[str, Any]]:
    """The last state; the last two where there are several processes, one of which may be a segment behind."""
    path = folder / _STATE
    return json.loads(path.read_text()) if path.exists() else []


def _commit(folder: Path, streams: Mapping[str, Stream]) -> None:
    """One rename makes the segment finished for all streams; then what only earlier ones needed can go."""
    position = streams["current"].position
    before = [state for state in _states(folder) if state["position"] == position - 1] if processes() > 1 else []
    states = [*before, {"position": position, "files": {name: stream.files for name, stream in streams.items()}}]
    write_json(folder / _STATE, states)
    for name in streams:
        needed = {file for state in states for batch in state["files"][name] for file in batch.values()}
        for path in (folder / name).iterdir():
            if path.name not in needed:
                path.unlink()


def _added_up(tap: Tap, owners: Mapping[str, int] | None) -> BlockMoments:
    if owners is not None:
        for accumulator in (*tap.moments.folds, tap.moments.held_out):
            add_up(accumulator, owners[tap.block.name])
    return tap.moments
