"""Prove on a probe batch that a shrunk model computes what the original computes with the removed units masked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import nn

from ..blocks import Block, groups_of
from ..models.forms import all_running
from ..models.linears import feature_axis, input_dim
from ..models.precision import HALVES, Wide, WideConvolutions
from ..models.running import Reached, Watch, first_line, floating_tensors, hooked, inside, stateless, stop, undisturbed
from ..runs.memory import is_of_the_machine
from .edits import Edit, shrink
from .masking import masked

TOLERANCE = 1e-4
"""Largest difference allowed, as a fraction of the largest absolute value of the tensor compared."""

# A difference up to so much may be rounding, which grows from layer to layer.
_SLIGHT = 100 * TOLERANCE


class EquivalenceError(RuntimeError):
    """A shrunk block does not compute what the original does with the removed units masked.

    Args:
        block: The block at fault.
        reason: What was found.
    """

    def __init__(self, block: Block, reason: str) -> None:
        self.block = block.name
        self.reason = reason
        self.producers = producers(block)
        super().__init__(
            f"Removing units of {block.name!r} is not exact: {reason}. Consumer: {block.consumer!r}; producers: "
            f"{', '.join(map(repr, self.producers)) or 'none'}. The model is as it was before; exclude the block to "
            f"prune the others."
        )


class _DifferenceError(Exception):
    """Outputs differ; `block` is the one at fault if its consumer's output shows it, `slight` if they hardly do."""

    def __init__(self, block: Block | None, reason: str, *, slight: bool = False) -> None:
        super().__init__(reason)
        self.block = block
        self.reason = reason
        self.slight = slight


def producers(block: Block) -> tuple[str, ...]:
    """Dotted paths of the modules, other than the consumer, that hold tensors of the block's units."""
    owners = dict.fromkeys(piece.tensor.rpartition(".")[0] for piece in block.slices)
    return tuple(owner for owner in owners if owner != block.consumer)


def verify(
    model: nn.Module,
    blocks: Sequence[Block],
    kept: Mapping[str, Sequence[int] | torch.Tensor],
    inputs: Mapping[str, Any],
    tolerance: float = TOLERANCE,
    to_consumer: bool = False,
    masking: Callable[[nn.Module, Block, torch.Tensor], AbstractContextManager[None]] = masked,
) -> float:
    """Check that removing units equals masking them, for all `blocks` at once.

    Two forwards without gradients in evaluation mode: the original with the removed units' columns masked to zero,
    and the model shrunk without reweighting. Compared are every floating output of the model and the output of every
    block's consumer, so that a block whose part in the output happens to be small (a layer scale near zero) cannot
    hide. Models in half precision are computed in float32 here, whatever they store: slicing is exact in any dtype,
    and rounding would otherwise hide what the check looks for. Where outputs differ by little, float64 decides.

    Args:
        model: The model, unshrunk; unchanged on return and on error.
        blocks: The blocks to shrink, in the order of the forward.
        kept: Units to keep, strictly increasing, by block name; one entry for each of `blocks`, equal within a tie but
            for blocks that keep none.
        inputs: Keyword arguments of the forward, a small batch.
        tolerance: Largest difference allowed, relative to the largest absolute value of the tensor compared.
        to_consumer: Stop each forward behind the last block's consumer and compare no more than that; faster.
        masking: What masks the units of a block that are not kept, given its consumer, the block and the units that
            are.

    Returns:
        The largest relative difference found.

    Raises:
        EquivalenceError: outputs differ, or it cannot run. It names the first block at fault.
        ValueError: blocks of one tie are to keep different units.
    """
    choices = [blocks for group in groups_of(blocks) for blocks in group.choices]
    for choice in choices:
        first, *others = [block for block in choice if len(kept[block.name])] or choice
        for block in others:
            if list(kept[block.name]) != list(kept[first.name]):
                raise ValueError(
                    f"Blocks {first.name!r} and {block.name!r} are tied ({first.tie!r}) and must keep the same units, "
                    f"found {list(map(int, kept[first.name]))} and {list(map(int, kept[block.name]))}."
                )
    causes: list[Exception] = []
    for dtype in (torch.float32, torch.float64):
        try:
            return _difference(model, blocks, kept, inputs, tolerance, masking, to_consumer, dtype)
        except Exception as error:
            if is_of_the_machine(error):
                raise
            causes.append(error)
            if not (isinstance(error, _DifferenceError) and error.slight):
                break
    cause = next((error for error in reversed(causes) if isinstance(error, _DifferenceError)), causes[0])
    reason = cause.reason if isinstance(cause, _DifferenceError) else f"it cannot run: {first_line(cause)}"
    culprit = cause.block if isinstance(cause, _DifferenceError) else None
    if culprit is None and len(choices) > 1:
        # A failed forward does not say which block broke it: ask each one.
        for choice in choices:
            verify(model, choice, kept, inputs, tolerance, masking=masking)
        reason = f"each of {len(blocks)} blocks can be shrunk alone, but with all of them shrunk: {reason}"
    raise EquivalenceError(culprit or blocks[-1], reason) from cause


def _difference(
    model: nn.Module,
    blocks: Sequence[Block],
    kept: Mapping[str, Sequence[int] | torch.Tensor],
    inputs: Mapping[str, Any],
    tolerance: float,
    masking: Callable[[nn.Module, Block, torch.Tensor], AbstractContextManager[None]],
    to_consumer: bool,
    dtype: torch.dtype,
) -> float:
    """What `verify` returns; computed in `dtype` at least.

    Raises:
        _DifferenceError: outputs differ by more than the tolerance.
    """
    consumers = {block.name: model.get_submodule(block.consumer) for block in blocks}
    with undisturbed(model), all_running(inside(model)), ExitStack() as stack:
        for block in blocks:
            stack.enter_context(masking(consumers[block.name], block, torch.as_tensor(kept[block.name])))
        expected = _run(model, blocks, inputs, to_consumer, dtype)
    remaining = [_remaining_outputs(model, block, blocks, kept) for block in blocks]
    edits: list[Edit] = []
    with undisturbed(model), all_running(inside(model)):
        try:
            for block in blocks:
                edits.append(shrink(model, block, kept[block.name]))
            found = _run(model, blocks, inputs, to_consumer, dtype)
        finally:
            for edit in reversed(edits):
                edit.undo()
    calls = [
        [output if stays is None else output.index_select(axis, stays.to(output.device)) for output in seen]
        for seen, (axis, stays) in zip(expected[0], remaining, strict=True)
    ]
    return _compare(blocks, (calls, expected[1]), found, tolerance)


def _remaining_outputs(
    model: nn.Module, block: Block, blocks: Sequence[Block], kept: Mapping[str, Any]
) -> tuple[int, torch.Tensor | None]:
    """Axis of a consumer's features and the outputs that it still has, where it is a producer of another block.

    Returns:
        Axis, and `(k,)` int64 or `None` when the consumer has all its outputs.
    """
    consumer = model.get_submodule(block.consumer)
    axis = feature_axis(consumer)
    for other in blocks:
        for piece in other.slices:
            if piece.tensor == f"{block.consumer}.weight" and piece.dim != input_dim(consumer):
                stays = torch.ones(model.get_parameter(piece.tensor).shape[piece.dim], dtype=torch.bool)
                stays[piece.index.flatten()] = False
                stays[piece.index[torch.as_tensor(kept[other.name])].flatten()] = True
                return axis, stays.nonzero().flatten()
    return axis, None


def _run(
    model: nn.Module, blocks: Sequence[Block], inputs: Mapping[str, Any], to_consumer: bool, dtype: torch.dtype
) -> tuple[list, list[torch.Tensor]]:
    """Outputs of each block's consumer, one list of calls per block, and all floating outputs of the model.

    Computed in `dtype` at least.
    """
    calls: list[list[torch.Tensor]] = [[] for _ in blocks]
    watches: list[Watch] = [(block.consumer, seen.append) for block, seen in zip(blocks, calls, strict=True)]
    if to_consumer:
        watches.append((blocks[-1].consumer, lambda _: stop()))
    with ExitStack() as stack, torch.no_grad(), stateless(model), hooked(model, outputs=watches):
        if dtype == torch.float64 or any(parameter.dtype in HALVES for parameter in model.parameters()):
            stack.enter_context(Wide(dtype))
            stack.enter_context(WideConvolutions(dtype))
        try:
            output = model(**inputs)
        except Reached:
            output = None
    return calls, list(floating_tensors(output))


def _compare(blocks: Sequence[Block], expected: tuple, found: tuple, tolerance: float) -> float:
    worst = 0.0
    pairs: list[tuple[Block | None, list, list]] = list(zip(blocks, found[0], expected[0], strict=True))
    for block, ours, theirs in [*pairs, (None, found[1], expected[1])]:
        what = "the model's output" if block is None else "the consumer's output"
        if len(ours) != len(theirs):
            raise _DifferenceError(block, f"{what} is made of {len(ours)} tensors in place of {len(theirs)}")
        for one, other in zip(ours, theirs, strict=True):
            worst = max(worst, _checked_difference(block, what, one, other, tolerance))
    return worst


def _checked_difference(
    block: Block | None, what: str, found: torch.Tensor, expected: torch.Tensor, tolerance: float
) -> float:
    if found.shape != expected.shape:
        raise _DifferenceError(block, f"{what} has shape {tuple(found.shape)} in place of {tuple(expected.shape)}")
    if found.numel() == 0:
        return 0.0
    # Masks put -inf (or NaN) into some outputs: those must agree entry by entry, the others in size.
    finite = expected.isfinite()
    if not torch.equal(found.isfinite(), finite):
        raise _DifferenceError(block, f"{what} is not finite where the masked original's is, or the reverse")
    if not finite.all():
        found, expected = found[finite], expected[finite]
        if found.numel() == 0:
            return 0.0
    wide = torch.promote_types(expected.dtype, torch.float32)
    scale = expected.abs().max().item()
    largest = (found.to(wide) - expected.to(wide)).abs().max().item()
    difference = largest / max(scale, torch.finfo(torch.float32).tiny)
    if not difference <= tolerance:
        raise _DifferenceError(
            block,
            f"{what} differs from the masked original's by {difference:.1e} of its largest value, "
            f"{tolerance:.0e} is allowed",
            slight=difference <= _SLIGHT,
        )
    return difference
