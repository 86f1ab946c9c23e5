"""Find the blocks that can go as a whole, and what need not run when they do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..blocks import Block, Bypass
from ..models.linears import is_linear
from ..models.paths import Modules, is_inside
from ..models.running import hooked, undisturbed
from ..surgery.verification import EquivalenceError
from .settling import Trials, numbers
from .ties import alike, by_choice


@dataclass(frozen=True, eq=False)
class _Call:
    """One call of a module: its first argument, and what it returned."""

    given: Any
    returned: Any

    @property
    def output(self) -> Any:
        """What it returned, or the first of several."""
        return self.returned[0] if isinstance(self.returned, (tuple, list)) and self.returned else self.returned

    @property
    def entries(self) -> int:
        """Of what it returned, as in `Bypass`."""
        return len(self.returned) if isinstance(self.returned, (tuple, list)) else 0


def with_removal(
    model: nn.Module, inputs: Mapping[str, Any], trials: Trials, blocks: Sequence[Block]
) -> tuple[Block, ...]:
    """The blocks, those marked as removable without which the model computes what it does with their units masked.

    Never channels of convolutions, which are in the residual stream's way, nor experts stored together.

    Args:
        model: The model.
        inputs: Keyword arguments of a small forward.
        trials: On the model.
        blocks: That shrink exactly, in the order of the forward.
    """
    offered = [block for block in blocks if block.kind != "channels" and block.stack is None]
    if not offered:
        return tuple(blocks)
    found = _bypasses(model, inputs, trials.modules, offered)
    offered = [replace(block, removable=True, bypasses=found[block.name]) for block in offered]
    offered = _without_needed(offered, trials)
    number = numbers([block] for block in offered)  # of a tie, one may go alone
    for part in (0, 1):  # some of each kind of layer are left, which may need what the others hand on
        while gone := [block for block in offered if number[block.name] % 2 == part]:
            error = _failure_without(trials, gone)
            if error is None:
                break
            culprit = next(block for block in gone if block.name == error.block)
            offered = [block for block in offered if alike(block) != alike(culprit)]
    removable = {block.name: block for block in offered}
    return tuple(removable.get(block.name, block) for block in blocks)


def _without_needed(blocks: Sequence[Block], trials: Trials) -> list[Block]:
    """The blocks but those of a tie that hand on to the last one of it what that cannot do without."""
    needed: list[Block] = []
    for *others, _ in by_choice(blocks):
        if others and _failure_without(trials, others):
            needed += others
    return [block for block in blocks if block not in needed]


def _failure_without(trials: Trials, gone: Sequence[Block]) -> EquivalenceError | None:
    return trials.failure(gone, {block.name: torch.empty(0, dtype=torch.long) for block in gone})


def _bypasses(
    model: nn.Module, inputs: Mapping[str, Any], modules: Modules, blocks: Sequence[Block]
) -> dict[str, tuple[Bypass, ...]]:
    """By name of a block, the module that holds its linears and returns what its consumer does, or what that reads."""
    within = {block.name: _producers_in(modules, block) for block in blocks}
    calls: dict[str, list[_Call]] = {}
    with ExitStack() as stack, undisturbed(model), torch.no_grad():
        for path in {path for b in blocks for path in (b.owner, b.consumer, within[b.name]) if path}:
            seen = calls.setdefault(path, [])
            stack.enter_context(_recorded(model, path, seen))
        model(**inputs)

    def bypasses(block: Block) -> Iterator[Bypass]:
        consumer = calls[block.consumer]
        inner = block.consumer.removeprefix(f"{block.owner}.")
        outputs, read = [call.output for call in consumer], [call.given for call in consumer]
        for path, name, made in ((block.owner, inner, outputs), (within[block.name], "", read)):
            others = any(is_inside(other.consumer, path) for other in blocks if other is not block)
            if path and not others and _returns(calls[path], made):
                yield Bypass(path, name, calls[path][0].entries)
                break
        if isinstance(modules[block.consumer], Conv1D):  # it makes its inputs a matrix, of as many rows as fit
            yield Bypass(block.consumer, ".", 0)

    return {block.name: tuple(bypasses(block)) for block in blocks}


def _recorded(model: nn.Module, path: str, seen: list[_Call]) -> Any:
    given: list[Any] = []
    return hooked(
        model, inputs=[(path, given.append)], outputs=[(path, lambda output: seen.append(_Call(given.pop(), output)))]
    )


def _producers_in(modules: Modules, block: Block) -> str:
    """Dotted path of the smallest module that holds all producers, if the consumer is outside of it; else `""`."""
    own = [piece for piece in block.slices if not piece.shared and not piece.tensor.startswith(f"{block.consumer}.")]
    path = replace(block, slices=tuple(own)).owner if own else ""
    outside = not f"{block.consumer}.".startswith(f"{path}.")
    return path if path and outside and not is_linear(modules[path]) else ""


def _returns(calls: Sequence[_Call], made: Sequence[Any]) -> bool:
    """Whether a module's calls return certain tensors, each with the positions of its first argument."""
    return len(calls) == len(made) > 0 and all(
        isinstance(call.given, torch.Tensor)
        and isinstance(call.output, torch.Tensor)
        and call.output.shape[:-1] == call.given.shape[:-1]
        and torch.equal(call.output, tensor)
        for call, tensor in zip(calls, made, strict=True)
    )
