"""Prove on a probe batch that a shrunk model computes what the original computes with the removed units masked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from .blocks import Block, by_tie
from .experts import all_running
from .linears import feature_axis, input_dim
from .surgery import Edit, caches, masked, shrink

TOLERANCE = 1e-4
"""Largest difference allowed, as a fraction of the largest absolute value of the tensor compared."""

HALVES = (torch.float16, torch.bfloat16)


_SHRINKING = ("past_key_values", "cache", "attentions", "router_logits", "aux_loss")


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
    """Outputs differ; `block` is the one at fault if its consumer's output shows it."""

    def __init__(self, block: Block | None, reason: str) -> None:
        super().__init__(reason)
        self.block = block
        self.reason = reason


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
    and rounding would otherwise hide what the check looks for.

    Args:
        model: The model, unshrunk; unchanged on return and on error.
        blocks: The blocks to shrink, in the order of the forward.
        kept: Units to keep, strictly increasing, by block name; one entry for each of `blocks`, equal within a tie.
        inputs: Keyword arguments of the forward, a small batch.
        tolerance: Largest difference allowed, relative to the largest absolute value of the tensor compared.
        to_consumer: Stop each forward behind the last block's consumer and compare no more than that; faster.
        masking: What masks the units of a block that are not kept; `surgery.masked` for columns of its consumer.

    Returns:
        The largest relative difference found.

    Raises:
        EquivalenceError: outputs differ, or it cannot run. It names the first block at fault.
        ValueError: blocks of one tie are to keep different units.
    """
    for first, *others in by_tie(blocks):
        for block in others:
            if list(kept[block.name]) != list(kept[first.name]):
                raise ValueError(
                    f"Blocks {first.name!r} and {block.name!r} are tied ({first.tie!r}) and must keep the same units, "
                    f"found {list(map(int, kept[first.name]))} and {list(map(int, kept[block.name]))}."
                )
    with undisturbed(model), all_running(model), ExitStack() as stack:
        for block in blocks:
            stack.enter_context(masking(model, block, torch.as_tensor(kept[block.name])))
        expected = _run(model, blocks, inputs, to_consumer)
    edits: list[Edit] = []
    remaining = [_remaining_outputs(model, block, blocks, kept) for block in blocks]
    with undisturbed(model), all_running(model):
        try:
            for block in blocks:
                edits.append(shrink(model, block, kept[block.name]))
            found = _run(model, blocks, inputs, to_consumer)
            calls = [
                [output if stays is None else output.index_select(axis, stays.to(output.device)) for output in seen]
                for seen, (axis, stays) in zip(expected[0], remaining, strict=True)
            ]
            return _compare(blocks, (calls, expected[1]), found, tolerance)
        except Exception as error:
            reason = error.reason if isinstance(error, _DifferenceError) else f"it cannot run: {first_line(error)}"
            culprit = error.block if isinstance(error, _DifferenceError) else None
            cause = error
        finally:
            for edit in reversed(edits):
                edit.undo()
    if culprit is None and len(by_tie(blocks)) > 1:
        # A failed forward does not say which block broke it: ask each one.
        for group in by_tie(blocks):
            verify(model, group, kept, inputs, tolerance, masking=masking)
        reason = f"each of {len(blocks)} blocks can be shrunk alone, but with all of them shrunk: {reason}"
    raise EquivalenceError(culprit or blocks[-1], reason) from cause


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


@contextmanager
def _stateless(model: nn.Module) -> Iterator[None]:
    """On exit, tensors that modules keep between forwards as plain attributes (recurrent states) are as before."""
    states = [
        (module, {name: value for name, value in vars(module).items() if value is None or type(value) is torch.Tensor})
        for module in model.modules()
    ]
    try:
        yield
    finally:
        for module, state in states:
            vars(module).update(state)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; on exit training flags, buffers, `requires_grad` and the RNG are as before."""
    training = [(module, module.training) for module in model.modules()]
    buffers = [(module._buffers, dict(module._buffers)) for module in model.modules() if module._buffers]
    values = [(buffer, buffer.clone()) for buffer in model.buffers() if buffer.device.type != "meta"]
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    cached = [(module, name, value) for module in model.modules() for name, value in caches(module)]
    with torch.random.fork_rng(), torch.inference_mode(False), _stateless(model):
        try:
            model.eval()
            for module, name, _ in cached:
                setattr(module, name, {})
            yield
        finally:
            for module, mode in training:
                module.training = mode
            for module, name, cache in cached:
                setattr(module, name, cache)
            for parameter, flag in trainable:
                parameter.requires_grad_(flag)
            for entries, before in buffers:
                entries.clear()
                entries.update(before)
            with torch.no_grad():
                for buffer, value in values:
                    if not torch.equal(buffer, value):
                        buffer.copy_(value)


class _ConvolutionsInFloat32(TorchFunctionMode):
    """Convolutions compare the dtypes of what they are given before they become operations of the other mode."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in _CONVOLUTIONS:
            args, kwargs = _widened(args), {name: _widened(value) for name, value in (kwargs or {}).items()}
        return func(*args, **(kwargs or {}))


_CONVOLUTIONS = (
    *(functional.conv1d, functional.conv2d, functional.conv3d),
    *(functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d),
)


class _InFloat32(TorchDispatchMode):
    """Every operation on half precision tensors is carried out in float32, and nothing is stored in less."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return func(*_widened(args), **{name: _widened(value) for name, value in (kwargs or {}).items()})


def _widened(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.float() if value.dtype in HALVES else value
    if isinstance(value, (list, tuple)):
        return type(value)(map(_widened, value))
    return torch.float32 if isinstance(value, torch.dtype) and value in HALVES else value


class _Reached(BaseException):
    """Ends a forward on purpose; not an `Exception`, so that no model code swallows it."""


def _stop(*_: Any) -> None:
    raise _Reached


def _run(
    model: nn.Module, blocks: Sequence[Block], inputs: Mapping[str, Any], to_consumer: bool
) -> tuple[list, list[torch.Tensor]]:
    """Outputs of each block's consumer, one list of calls per block, and all floating outputs of the model."""
    calls: list[list[torch.Tensor]] = [[] for _ in blocks]
    with ExitStack() as stack, torch.no_grad(), _stateless(model):
        for block, seen in zip(blocks, calls, strict=True):
            consumer = model.get_submodule(block.consumer)
            handle = consumer.register_forward_hook(lambda _, __, output, seen=seen: seen.append(output))
            stack.callback(handle.remove)
        if any(parameter.dtype in HALVES for parameter in model.parameters()):
            stack.enter_context(_InFloat32())
            stack.enter_context(_ConvolutionsInFloat32())
        if to_consumer:
            stack.callback(model.get_submodule(blocks[-1].consumer).register_forward_hook(_stop).remove)
        try:
            output = model(**inputs)
        except _Reached:
            output = None
    return calls, list(floating_tensors(output))


def floating_tensors(output: Any) -> Iterator[torch.Tensor]:
    """Every floating tensor in a model's output, through tuples, lists and mappings, but not in caches.

    Key/value caches and attention maps have one entry per head, and what routers say one per expert: they shrink with
    the model.
    """
    if isinstance(output, torch.Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        for key, value in output.items():
            if not any(name in key for name in _SHRINKING):
                yield from floating_tensors(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from floating_tensors(value)


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
    found, expected = found[finite].float(), expected[finite].float()
    if found.numel() == 0:
        return 0.0
    scale = float(expected.abs().max())
    difference = float((found - expected).abs().max()) / max(scale, torch.finfo(torch.float32).tiny)
    if not difference <= tolerance:
        raise _DifferenceError(
            block,
            f"{what} differs from the masked original's by {difference:.1e} of its largest value, "
            f"{tolerance:.0e} is allowed",
        )
    return difference


def first_line(error: Exception) -> str:
    """What went wrong, in one line."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
