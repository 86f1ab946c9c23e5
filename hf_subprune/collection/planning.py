"""Split a model into segments, and prove that they can be run one at a time."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from ..blocks import Block, some_of
from ..data.batches import Samples
from ..models.paths import ancestors_of, is_inside
from ..models.running import call, copied, hooked
from ..runs.memory import is_of_the_machine
from .segments import Plan, Segment
from .stream import Stream

_CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


def plan(samples: Samples, blocks: Sequence[Block]) -> Plan:
    """Split the model of samples into segments by watching one forward on their probe.

    The split is checked on the spot: replayed segment by segment, each must see exactly the inputs that it saw in the
    plain forward.

    Raises:
        ValueError: the forward does not call the consumers of some blocks; the message names these.
    """
    probe = Samples.of(samples.model, [samples.probe])
    modules = dict(samples.model.named_modules())
    calls: dict[str, int] = {}
    paths = {path for block in blocks for module in _modules(block) for path in ancestors_of(module)}

    def count(path: str) -> Callable[[Any], None]:
        def called(_: Any) -> None:
            calls[path] = calls.get(path, 0) + 1  # a dict keeps the order of the first calls

        return called

    with hooked(samples.model, inputs=[(path, count(path)) for path in paths]):
        call(samples.model, probe.fit[0])

    if unreached := [b.name for b in blocks if b.consumer not in calls]:
        raise ValueError(
            f"The probe batch, the first samples of the data, does not reach {some_of(unreached)}: begin the data "
            f"with samples that do, or leave this part of the model whole with `exclude`."
        )
    reached = sorted(blocks, key=lambda b: list(calls).index(b.consumer))
    members: dict[str, list[Block]] = {}
    for block in reached:
        members.setdefault(_segment_path(block, reached, modules, calls), []).append(block)
    for path in list(members):  # a segment inside another one is part of it
        outer = next((p for p in members if p != path and is_inside(path, p)), None)
        if outer is not None:
            members[outer] = [b for b in reached if b in members[outer] or b in members[path]]
            del members[path]
    order = list(calls)
    segments = [
        Segment(path, tuple(inside), tuple(calls[b.consumer] for b in inside))
        for path, inside in sorted(members.items(), key=lambda item: order.index(item[0]))
    ]
    leads = _leads(probe, segments)
    plain = _plain_forward(probe, segments)
    for retain_all in (False, True):
        found = Plan(tuple(segments), retain_all)
        if leads and _replays_exactly(probe, replace(found, leads=leads), plain):
            return replace(found, leads=leads)
        if _replays_exactly(probe, found, plain):
            alone = {p: at for p, at in leads.items() if _replays_exactly(probe, replace(found, leads={p: at}), plain)}
            together = replace(found, leads=alone)
            return together if alone and _replays_exactly(probe, together, plain) else found
    whole = Segment("", tuple(reached), tuple(calls[b.consumer] for b in reached))
    return Plan((whole,), False)


def _modules(block: Block) -> set[str]:
    """Dotted paths of the modules that shrink with a block."""
    return {block.consumer} | {piece.tensor.rpartition(".")[0] for piece in block.slices if not piece.shared}


def _segment_path(
    block: Block, blocks: Sequence[Block], modules: Mapping[str, nn.Module], calls: Mapping[str, int]
) -> str:
    """The outermost container element around a block, or the nearest module around that which is called once.

    A block outside of all containers is run again with every segment behind it: cheap, as its consumer's output is
    stored, as long as that does not change. So its consumer is enough where it is no other block's producer.
    """
    inside = _modules(block)
    ancestors = ancestors_of(block.consumer)[:-1]
    containers = [path for path in ancestors if isinstance(modules[path], _CONTAINERS)]
    loose = not any(_container(path, modules) for path in inside)
    if (
        loose
        and calls[block.consumer] == 1
        and not any(inside & _modules(other) for other in blocks if other != block)
    ):
        return block.consumer
    depth = ancestors.index(containers[0]) + 1 if containers else len(ancestors) - 1
    depth = min(depth, len(ancestors) - 1)
    while depth > 0 and (
        calls.get(ancestors[depth], 0) != 1 or not all(is_inside(path, ancestors[depth]) for path in inside)
    ):
        depth -= 1
    return ancestors[depth]


def _container(path: str, modules: Mapping[str, nn.Module]) -> bool:
    return any(isinstance(modules[above], _CONTAINERS) for above in ancestors_of(path)[:-1])


@dataclass
class _Seen:
    inputs: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    outputs: dict[str, Any] = field(default_factory=dict)


def _watched(probe: Samples, paths: Sequence[str], seen: _Seen) -> AbstractContextManager[None]:
    def note_inputs(path: str) -> Callable[[Any, Any], None]:
        def note(args: Any, kwargs: Any) -> None:
            seen.inputs[path] = [x.clone() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]

        return note

    def note_output(path: str) -> Callable[[Any], None]:
        def note(output: Any) -> None:
            seen.outputs[path] = copied(output)

        return note

    return hooked(
        probe.model,
        arguments=[(path, note_inputs(path)) for path in paths],
        outputs=[(path, note_output(path)) for path in paths],
    )


def _leads(probe: Samples, segments: Sequence[Segment]) -> dict[str, int]:
    """Modules with weights, called once and outside of all segments, and the position of the segment called next."""
    paths = {segment.path for segment in segments}
    above = {ancestor for path in paths for ancestor in ancestors_of(path)[:-1]}
    begun: set[str] = set()
    ended: dict[str, list[int | None]] = {}

    def begin(path: str) -> Callable[[Any], None]:
        return lambda _: begun.add(path)

    def end(path: str) -> Callable[[Any], None]:
        def note(output: Any) -> None:
            leaves = [leaf for leaf in tree_leaves(output) if leaf is not None]
            plain = all(isinstance(leaf, torch.Tensor) and leaf.is_floating_point() for leaf in leaves)
            ended.setdefault(path, []).append(len(begun) if plain and len(begun) < len(segments) else None)

        return note

    outside = [
        path
        for path, module in probe.model.named_modules()
        if path not in above | paths
        and not any(is_inside(path, segment) for segment in paths)
        and next(module.parameters(), None) is not None
    ]
    begins, ends = [(path, begin(path)) for path in paths], [(path, end(path)) for path in outside]
    with hooked(probe.model, inputs=begins, outputs=ends):
        call(probe.model, probe.fit[0])
    once = {path: at[0] for path, at in ended.items() if len(at) == 1 and at[0] is not None}
    return {path: at for path, at in once.items() if not any(is_inside(path, p) for p in once if p != path)}


def _plain_forward(probe: Samples, segments: Sequence[Segment]) -> _Seen:
    """What segments see in the plain forward."""
    seen = _Seen()
    with _watched(probe, [segment.path for segment in segments], seen):
        call(probe.model, probe.fit[0])
    return seen


def _replays_exactly(probe: Samples, plan: Plan, plain: _Seen) -> bool:
    """Whether each segment sees, when it is run alone, the inputs that it sees in the plain forward."""
    stream = Stream(probe, plan)
    for path in (segment.path for segment in plan.segments):
        alone = _Seen()
        with _watched(probe, [path], alone):
            try:
                stream.run(0)
            except Exception as error:  # of whatever type: what stands in for an output was read after all
                if is_of_the_machine(error):
                    raise
                return False
        if path not in alone.inputs or len(alone.inputs[path]) != len(plain.inputs[path]):
            return False
        if not all(torch.equal(x, y) for x, y in zip(alone.inputs[path], plain.inputs[path], strict=True)):
            return False
        stream.step()
    return True
