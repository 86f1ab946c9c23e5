"""Split a model into segments, and prove that they can be run one at a time."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from ..blocks import Block, some_of
from ..data.batches import Samples
from ..models.paths import ancestors_of, is_inside
from ..models.running import call, floating_tensors, hooked
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
    probe = Samples.of(samples.model, [samples.short_probe])
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
    plain, leads, output = _plain_forward(probe, segments)

    def proved(found: Plan) -> Plan | None:
        stream = _replayed_exactly(probe, found, plain)
        return None if stream is None else replace(found, ends=_ends_alike(stream, output))

    for retain_all in (False, True):
        found = Plan(tuple(segments), retain_all)
        if leads and (led := proved(replace(found, leads=leads))):
            return led
        if bare := proved(found):
            alone = {
                p: at for p, at in leads.items() if _replayed_exactly(probe, replace(found, leads={p: at}), plain)
            }
            return (proved(replace(found, leads=alone)) if alone else None) or bare
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


_Inputs = dict[str, list[torch.Tensor]]
"""By path of a segment, the tensors among what it was called with."""


def _plain_forward(probe: Samples, segments: Sequence[Segment]) -> tuple[_Inputs, dict[str, int], Any]:
    """What segments see in the plain forward; leads, with the position of the segment called next; its output.

    Leads are modules with weights, called once and outside of all segments, whose output no further segment is given.
    """
    model, seen = probe.model, _Inputs()
    paths = {segment.path for segment in segments}
    above = {ancestor for path in paths for ancestor in ancestors_of(path)[:-1]}
    ended: dict[str, list[tuple[int, Any]]] = {}
    late: set[str] = set()

    def begin(path: str) -> Callable[[Any, Any], None]:
        def begun(args: Any, kwargs: Any) -> None:
            given = _tensors_in(args, kwargs)
            known = {id(x) for x in given}
            for lead, calls in ended.items():
                if any(at < len(seen) and known & set(map(id, tree_leaves(output))) for at, output in calls):
                    late.add(lead)
            seen[path] = [x.clone() for x in given]

        return begun

    def end(path: str) -> Callable[[Any], None]:
        return lambda output: ended.setdefault(path, []).append((len(seen), output))

    outside = [
        path
        for path, module in model.named_modules()
        if path not in above | paths
        and not any(is_inside(path, segment) for segment in paths)
        and next(module.parameters(), None) is not None
    ]
    with hooked(model, arguments=[(p, begin(p)) for p in paths], outputs=[(p, end(p)) for p in outside]):
        output = call(model, probe.fit[0])
    once = {
        path: calls[0][0]
        for path, calls in ended.items()
        if len(calls) == 1 and calls[0][0] < len(segments) and _is_plain(calls[0][1])
    }
    outermost = {path: at for path, at in once.items() if not any(is_inside(path, p) for p in once if p != path)}
    return seen, {path: at for path, at in outermost.items() if path not in late}, output


def _tensors_in(*values: Any) -> list[torch.Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, torch.Tensor)]


def _is_plain(output: Any) -> bool:
    leaves = [leaf for leaf in tree_leaves(output) if leaf is not None]
    return all(isinstance(leaf, torch.Tensor) and leaf.is_floating_point() for leaf in leaves)


def _noted(model: nn.Module, path: str, seen: _Inputs) -> AbstractContextManager[None]:
    def note(args: Any, kwargs: Any) -> None:
        seen[path] = [x.clone() for x in _tensors_in(args, kwargs)]

    return hooked(model, arguments=[(path, note)])


def _replayed_exactly(probe: Samples, plan: Plan, plain: _Inputs) -> Stream | None:
    """The probe's stream behind all segments; `None` unless each, run alone, sees what it saw in the plain one."""
    stream = Stream(probe, plan)
    for path in (segment.path for segment in plan.segments):
        alone = _Inputs()
        with _noted(probe.model, path, alone):
            try:
                stream.run(0)
            except Exception as error:  # of whatever type: what stands in for an output was read after all
                if is_of_the_machine(error):
                    raise
                return None
        if path not in alone or not _equal(alone[path], plain[path]):
            return None
        stream.step()
    return stream


def _ends_alike(stream: Stream, output: Any) -> bool:
    """Whether the forward of the probe puts out behind a stream what it does as a whole."""
    try:
        with stream.behind(0):
            ours = call(stream.model, stream.batches[0])
    except Exception as error:  # as above
        if is_of_the_machine(error):
            raise
        return False
    return _equal(list(floating_tensors(ours)), list(floating_tensors(output)))


def _equal(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> bool:
    return len(ours) == len(theirs) and all(torch.equal(x, y) for x, y in zip(ours, theirs, strict=True))
