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
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from ..data.batches import Samples
from ..models.running import call, forward_replaced, hooked, input_device, said_again, stop
from ..runs.store import Store
from .segments import Plan, Segment


class Stream:
    """Batches on their way through a model: the stored outputs of the segments that are finished.

    Args:
        samples: The batches, and their model, in eval mode. The weights that it has when a segment runs are the ones
            that are used.
        plan: From `planning.plan`.
        store: Of the outputs.
    """

    def __init__(self, samples: Samples, plan: Plan, store: Store | None = None):
        self.model, self.plan, self.store = samples.model, plan, store or Store()
        batches = self.batches = [*samples.fit, *samples.held_out]
        self.position = 0
        self.kept: Sequence[Mapping[str, Any]] = [{} for _ in batches]  # by segment, what stands for its output
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
        known: Mapping[str, Callable[[], Any]] | None = None,
    ) -> None:
        """Run the current segment on one batch; its output is remembered until `step`.

        Args:
            index: Of the batch.
            inputs: Pairs of a module path and what to call with the module's first input whenever it is called; it may
                `stop` the forward.
            outputs: Pairs of a module path and what to call with the module's output, likewise.
            stop_at: Path of a block's consumer: end at its last call, before it computes anything, instead of at the
                end of the segment (the segment's output is then not computed).
            known: By path, modules in the segment that do not run, and what makes what they put out.
        """
        segment = self.segment

        def finished(output: Any) -> None:
            self.put(index, output)
            stop()

        if stop_at is None:
            outputs = [*outputs, (segment.path, finished)]
        with hooked(self.model, inputs=inputs, outputs=outputs), ExitStack() as stack:
            if stop_at is not None:
                calls = dict(zip((b.consumer for b in segment.blocks), segment.calls, strict=True))[stop_at]
                stack.enter_context(_ended_at_call(calls, self.model.get_submodule(stop_at)))
            stack.enter_context(self.behind(index))
            for path, output in (known or {}).items():
                stack.enter_context(said_again(self.model.get_submodule(path), output))
            call(self.model, self.batches[index])

    @contextmanager
    def behind(self, index: int) -> Iterator[None]:
        """Inside, forwards of a batch run neither the segments that are finished nor what leads to them.

        Args:
            index: Of the batch.
        """
        device = input_device(self.model)
        before = {path: self.store.read(kept, device) for path, kept in self.kept[index].items()}
        with self._stubbed(before), self._led(self._stand_ins[index]):
            yield

    @contextmanager
    def _stubbed(self, stored: Mapping[str, Any]) -> Iterator[None]:
        """Finished segments return stored outputs: their own, or the one of the last finished of their chain."""
        latest = {path.rpartition(".")[0]: output for path, output in stored.items()}
        with ExitStack() as stack:
            for segment in self.plan.segments[: self.position]:
                output = stored[segment.path] if segment.path in stored else latest[segment.chain]
                module = self.model.get_submodule(segment.path)
                stack.enter_context(forward_replaced(module, partial(_return, output)))
            yield

    @contextmanager
    def _led(self, stand_ins: dict[str, Any]) -> Iterator[None]:
        """Leads of finished segments are not run; what stands in for their outputs is noted when they are."""

        def note(path: str) -> Callable[[Any], None]:
            def noted(output: Any) -> None:
                stand_ins[path] = tree_map(_stand_in, output)

            return noted

        unknown = [(path, note(path)) for path in self.plan.leads if path not in stand_ins]
        known = [path for path, at in self.plan.leads.items() if path in stand_ins and at < self.position]
        with hooked(self.model, outputs=unknown), ExitStack() as stack:
            for path in known:
                module = self.model.get_submodule(path)
                stack.enter_context(forward_replaced(module, partial(_made, stand_ins[path])))
            yield

    def put(self, index: int, output: Any) -> None:
        """The output of the current segment on one batch, in place of running it."""
        self._next[index] = self.store.keep(f"{index}-{self.position}", output)

    def step(self) -> None:
        """Go on to the next segment, once every batch has been run to the end of the current one."""
        path, chain = self.segment.path, self.segment.chain
        stays = [
            {p: held for p, held in kept.items() if self.plan.retain_all or p.rpartition(".")[0] != chain}
            for kept in self.kept
        ]
        self.kept = [{**kept, path: output} for kept, output in zip(stays, self._next, strict=True)]
        self._next = [None] * len(self.batches)
        self.position += 1

    def resume(self, position: int, kept: Sequence[Mapping[str, Any]]) -> None:
        """Go on at a segment, with what the store kept then."""
        self.position, self.kept = position, kept


class Rest:
    """What is left of forwards once a stream has come through all segments, of the batches held out.

    Args:
        stream: What it holds of other batches is let go of.
        batches: Positions of those held out in the stream, of this process.
    """

    def __init__(self, stream: Stream, batches: Sequence[int]) -> None:
        self._stream, self._batches = stream, batches
        stream.kept = [kept if index in batches else {} for index, kept in enumerate(stream.kept)]

    @classmethod
    def of(cls, stream: Stream, batches: Sequence[int]) -> "Rest | None":
        """Of a stream that has come so far with these batches; `None` otherwise, or where more would be read."""
        segments = stream.plan.segments
        if not segments or not stream.plan.ends or stream.position < len(segments):
            return None
        came = all(stream.kept[index].get(segments[-1].path) is not None for index in batches)
        return cls(stream, batches) if came else None

    def of_batch(self, number: int) -> AbstractContextManager[None]:
        """Inside, forwards of a batch held out run no more than this; `number` counts those of this process."""
        return self._stream.behind(self._batches[number])


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
