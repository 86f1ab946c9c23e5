"""Advance calibration batches through a model one segment at a time, at the cost of one forward a stream in all.

A *segment* is a part of the model that the forward calls exactly once and that holds blocks: as a rule one layer. A
block that reaches over several layers is in the part around them, or has its consumer for a segment of its own. To
run segment `t` on a batch, the whole model is called with every finished segment stubbed to return its stored output
and with the forward stopped right behind segment `t`. Whatever the model does between its layers (masks, position
embeddings, a bias shared by all layers, the hand-over from encoder to decoder) runs as its authors wrote it. Only
modules between the segments that nothing but the next segment reads (*leads*: embeddings, a convolutional stem, layers
that are not pruned) are not run again once that segment is finished.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate.utils import send_to_device
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from .blocks import Block, some_of
from .durable import read_objects, write_objects
from .offload import input_device

Batch = dict[str, Any]
_CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


class _Reached(BaseException):
    """Ends a forward at the module that was asked for; not an `Exception`, so that no model code swallows it."""


def stop() -> NoReturn:
    """End the forward of `Stream.run` in which something is called; the segment's output is then not computed."""
    raise _Reached


@dataclass(frozen=True)
class Segment:
    """A part of the model that one forward calls once.

    Args:
        path: Dotted path of the module; `""` is the model itself.
        blocks: The blocks inside, in the order in which the forward reaches their consumers.
        calls: How often one forward calls each of their consumers, in the same order (1 but for shared layers).
    """

    path: str
    blocks: tuple[Block, ...]
    calls: tuple[int, ...]

    @property
    def chain(self) -> str:
        """Path of the container that holds the segment; segments of one container follow one another."""
        return self.path.rpartition(".")[0]


@dataclass(frozen=True)
class Plan:
    """The segments in forward order.

    Args:
        segments: In the order in which the forward calls them.
        retain_all: Whether every segment's output must be kept (a later part reads it), not only each chain's last.
        leads: Modules that are not run again behind a segment, and the position of that segment.
    """

    segments: tuple[Segment, ...]
    retain_all: bool
    leads: Mapping[str, int] = field(default_factory=dict)


def plan(model: nn.Module, blocks: Sequence[Block], batch: Batch) -> Plan:
    """Split a model into segments by watching one forward on `batch` (a small one will do).

    The split is checked on the spot: replayed segment by segment, each must see exactly the inputs that it saw in the
    plain forward.

    Raises:
        ValueError: the forward does not call the consumers of some blocks; the message names these.
    """
    modules = dict(model.named_modules())
    calls: dict[str, int] = {}
    paths = {path for block in blocks for module in _modules(block) for path in _ancestors(module)}

    def count(path: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            calls[path] = calls.get(path, 0) + 1  # a dict keeps the order of the first calls

        return hook

    with ExitStack() as stack:
        for path in paths:
            stack.callback(modules[path].register_forward_pre_hook(count(path)).remove)
        call(model, batch)

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
        outer = next((p for p in members if p != path and _inside(path, p)), None)
        if outer is not None:
            members[outer] = [b for b in reached if b in members[outer] or b in members[path]]
            del members[path]
    order = list(calls)
    segments = [
        Segment(path, tuple(inside), tuple(calls[b.consumer] for b in inside))
        for path, inside in sorted(members.items(), key=lambda item: order.index(item[0]))
    ]
    leads = _leads(model, segments, batch)
    for retain_all in (False, True):
        found = Plan(tuple(segments), retain_all)
        if leads and _replays_exactly(model, replace(found, leads=leads), batch):
            return replace(found, leads=leads)
        if _replays_exactly(model, found, batch):
            alone = {p: at for p, at in leads.items() if _replays_exactly(model, replace(found, leads={p: at}), batch)}
            together = replace(found, leads=alone)
            return together if alone and _replays_exactly(model, together, batch) else found
    whole = Segment("", tuple(reached), tuple(calls[b.consumer] for b in reached))
    return Plan((whole,), False)


class Stream:
    """Batches on their way through a model: the stored outputs of the segments that are finished.

    Args:
        model: In eval mode. The weights that it has when a segment runs are the ones that are used.
        plan: From `plan`.
        batches: Inputs of the model's forward.
        folder: For files of the stored outputs; they stay in memory without one.
    """

    def __init__(self, model: nn.Module, plan: Plan, batches: Sequence[Batch], folder: Path | None = None):
        self.model, self.plan, self.batches, self.folder = model, plan, batches, folder
        self.position = 0
        self._outputs: list[dict[str, Any]] = [{} for _ in batches]
        self._stand_ins: list[dict[str, Any]] = [{} for _ in batches]  # what makes them, by lead
        self._next: list[Any] = [None] * len(batches)

    @property
    def segment(self) -> Segment:
        """The segment that `run` runs."""
        return self.plan.segments[self.position]

    def run(
        self,
        index: int,
        *,
        inputs: Iterable[tuple[str, Callable[[torch.Tensor], None]]] = (),
        outputs: Iterable[tuple[str, Callable[[Any], None]]] = (),
        stop_at: str | None = None,
    ) -> None:
        """Run the current segment on one batch; its output is remembered until `step`.

        Args:
            index: Of the batch.
            inputs: Pairs of a module path and what to call with the module's first input whenever it is called; it may
                `stop` the forward.
            outputs: Pairs of a module path and what to call with the module's output, likewise.
            stop_at: Path of a block's consumer: end at its last call, before it computes anything, instead of at the
                end of the segment (the segment's output is then not computed).
        """
        segment = self.segment
        with ExitStack() as stack:
            for path, tap in inputs:
                hook = self.model.get_submodule(path).register_forward_pre_hook(_input_hook(tap), with_kwargs=True)
                stack.callback(hook.remove)
            for path, tap in outputs:
                hook = self.model.get_submodule(path).register_forward_hook(lambda _m, _a, y, tap=tap: tap(y))
                stack.callback(hook.remove)

            def finished(_module: nn.Module, _args: Any, output: Any) -> None:
                self._next[index] = self._stored(index, output)
                stop()

            if stop_at is None:
                stack.callback(self.model.get_submodule(segment.path).register_forward_hook(finished).remove)
            else:
                calls = dict(zip((b.consumer for b in segment.blocks), segment.calls, strict=True))[stop_at]
                stack.enter_context(_ended_at_call(calls, self.model.get_submodule(stop_at)))
            before = {path: self._read(output) for path, output in self._outputs[index].items()}
            stack.enter_context(_stubbed(self.model, self.plan, self.position, before))
            stack.enter_context(self._led(self._stand_ins[index]))
            call(self.model, self.batches[index])

    @contextmanager
    def _led(self, stand_ins: dict[str, Any]) -> Iterator[None]:
        """Leads of finished segments are not run; what stands in for their outputs is noted when they are."""

        def note(path: str) -> Callable[..., None]:
            def hook(_module: nn.Module, _args: Any, output: Any) -> None:
                stand_ins[path] = tree_map(_stand_in, output)

            return hook

        with ExitStack() as stack:
            for path, position in self.plan.leads.items():
                module = self.model.get_submodule(path)
                if path not in stand_ins:
                    stack.callback(module.register_forward_hook(note(path)).remove)
                elif position < self.position:
                    stack.enter_context(forward_replaced(module, partial(_made, stand_ins[path])))
            yield

    def step(self) -> None:
        """Go on to the next segment, once every batch has been run to the end of the current one."""
        segment = self.segment
        for stored, output in zip(self._outputs, self._next, strict=True):
            if not self.plan.retain_all:
                for other in [p for p in stored if p.rpartition(".")[0] == segment.chain]:
                    del stored[other]
            stored[segment.path] = output
        self._next = [None] * len(self.batches)
        self.position += 1

    @property
    def files(self) -> list[dict[str, str]]:
        """By batch and segment, the file of each stored output, as plain JSON types; of batches that were run here."""
        return [{path: file.name for path, file in stored.items() if file is not None} for stored in self._outputs]

    def resume(self, position: int, files: Sequence[Mapping[str, str]]) -> None:
        """Go on at a segment, with the outputs in the folder's files, which `files` named then."""
        self.position = position
        self._outputs = [{path: self.folder / name for path, name in stored.items()} for stored in files]  # type: ignore

    def _stored(self, index: int, output: Any) -> Any:
        if self.folder is None:
            return output
        path = self.folder / f"{index}-{self.position}.pt"
        write_objects(path, output)
        return path

    def _read(self, output: Any) -> Any:
        return send_to_device(read_objects(output), input_device(self.model)) if self.folder else output


def call(model: nn.Module, batch: Batch) -> Any:
    """The model's forward on a batch, on the model's device, without gradients or key/value cache.

    Returns `None` when the forward was stopped on purpose.
    """
    with torch.no_grad():
        try:
            return model(**placed(model, batch))
        except _Reached:
            return None


def placed(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """Arguments of the model's forward, on the model's device, without key/value cache."""
    device = input_device(model)
    arguments = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    if "use_cache" in signature(model.forward).parameters:
        arguments.setdefault("use_cache", False)
    return arguments


def _ancestors(path: str) -> list[str]:
    """`"a.b.c"` -> `["", "a", "a.b", "a.b.c"]`."""
    parts = path.split(".")
    return [".".join(parts[:i]) for i in range(len(parts) + 1)]


def _inside(path: str, outer: str) -> bool:
    return outer == "" or path.startswith(outer + ".")


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
    ancestors = _ancestors(block.consumer)[:-1]
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
        calls.get(ancestors[depth], 0) != 1 or not all(_inside(path, ancestors[depth]) for path in inside)
    ):
        depth -= 1
    return ancestors[depth]


def _container(path: str, modules: Mapping[str, nn.Module]) -> bool:
    return any(isinstance(modules[above], _CONTAINERS) for above in _ancestors(path)[:-1])


def _input_hook(tap: Callable[[torch.Tensor], None]) -> Callable[..., None]:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tap(args[0] if args else next(iter(kwargs.values())))

    return hook


@contextmanager
def _stubbed(model: nn.Module, plan: Plan, position: int, stored: Mapping[str, Any]) -> Iterator[None]:
    """Finished segments return stored outputs: their own, or the one of the last finished segment of their chain."""
    latest = {path.rpartition(".")[0]: output for path, output in stored.items()}
    with ExitStack() as stack:
        for segment in plan.segments[:position]:
            output = stored[segment.path] if segment.path in stored else latest[segment.chain]
            stub = partial(_return, output)
            stack.enter_context(forward_replaced(model.get_submodule(segment.path), stub))
        yield


def _return(output: Any, *_args: Any, **_kwargs: Any) -> Any:
    return output


def _stand_in(tensor: Any) -> Any:
    """Makes a tensor like one that nothing reads; should something, it is missing values that it finds."""
    if not isinstance(tensor, torch.Tensor):
        return tensor
    return partial(torch.full, tensor.shape, float("nan"), dtype=tensor.dtype, device=tensor.device)


def _made(stand_ins: Any, *_args: Any, **_kwargs: Any) -> Any:
    return tree_map(lambda make: make() if isinstance(make, partial) else make, stand_ins)


@contextmanager
def forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Another forward for the time being; the module's hooks stay."""
    had = module.__dict__.get("forward")  # accelerate's hooks put a forward on the instance, too
    module.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        if had is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = had


@contextmanager
def _ended_at_call(number: int, module: nn.Module) -> Iterator[None]:
    """The module's call of this number computes nothing, and ends the forward behind hooks that are on the module.

    Behind them, as those that read its weights from elsewhere drop them then.
    """
    left, run = number, module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal left
        left -= 1
        return run(*args, **kwargs) if left else None

    def ended(*_: Any) -> None:
        if left == 0:
            stop()

    with forward_replaced(module, forward), ExitStack() as stack:
        stack.callback(module.register_forward_hook(ended).remove)
        yield


@dataclass
class _Seen:
    inputs: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    outputs: dict[str, Any] = field(default_factory=dict)


@contextmanager
def _watched(model: nn.Module, paths: Sequence[str], seen: _Seen) -> Iterator[None]:
    def note_inputs(path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: Any, kwargs: Any) -> None:
            seen.inputs[path] = [x.clone() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]

        return hook

    def note_output(path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            seen.outputs[path] = tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, output)

        return hook

    with ExitStack() as stack:
        for path in paths:
            module = model.get_submodule(path)
            stack.callback(module.register_forward_pre_hook(note_inputs(path), with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(note_output(path)).remove)
        yield


def _leads(model: nn.Module, segments: Sequence[Segment], batch: Batch) -> dict[str, int]:
    """Modules with weights, called once and outside of all segments, and the position of the segment called next."""
    paths = {segment.path for segment in segments}
    above = {ancestor for path in paths for ancestor in _ancestors(path)[:-1]}
    begun: set[str] = set()
    ended: dict[str, list[int | None]] = {}

    def begin(path: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            begun.add(path)

        return hook

    def end(path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            leaves = [leaf for leaf in tree_leaves(output) if leaf is not None]
            plain = all(isinstance(leaf, torch.Tensor) and leaf.is_floating_point() for leaf in leaves)
            ended.setdefault(path, []).append(len(begun) if plain and len(begun) < len(segments) else None)

        return hook

    with ExitStack() as stack:
        for path in paths:
            stack.callback(model.get_submodule(path).register_forward_pre_hook(begin(path)).remove)
        for path, module in model.named_modules():
            outside = path not in above | paths and not any(_inside(path, segment) for segment in paths)
            if outside and next(module.parameters(), None) is not None:
                stack.callback(module.register_forward_hook(end(path)).remove)
        call(model, batch)
    once = {path: at[0] for path, at in ended.items() if len(at) == 1 and at[0] is not None}
    return {path: at for path, at in once.items() if not any(_inside(path, p) for p in once if p != path)}


def _replays_exactly(model: nn.Module, plan: Plan, batch: Batch) -> bool:
    """Whether each segment sees, when it is run alone, the inputs that it sees in the plain forward."""
    plain = _Seen()
    paths = [segment.path for segment in plan.segments]
    with _watched(model, paths, plain):
        call(model, batch)
    stream = Stream(model, plan, [batch])
    for path in paths:
        alone = _Seen()
        with _watched(model, [path], alone):
            try:
                stream.run(0)
            except Exception:  # of whatever type: what stands in for an output was read after all
                return False
        if path not in alone.inputs or len(alone.inputs[path]) != len(plain.inputs[path]):
            return False
        if not all(torch.equal(x, y) for x, y in zip(alone.inputs[path], plain.inputs[path], strict=True)):
            return False
        stream.step()
    return True
