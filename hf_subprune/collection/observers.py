"""What is taken from the inputs and outputs of one block's consumer as batches run by."""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from accelerate.utils.memory import should_reduce_batch_size
from torch import nn

from ..blocks import Block
from ..data.batches import Samples
from ..models.experts import routed_tokens
from ..models.linears import feature_axis, input_rows, matrix_shape, output_positions, output_rows
from ..models.offload import device_of
from ..models.running import stop
from ..runs.durable import read_objects, write_objects
from .additions import Addition, first_tensor
from .block_moments import FOLDS, BlockMoments, accumulator

Hooks = list[tuple[str, Callable[[Any], None]]]
"""Paths of modules, and what to call with the input or output of each."""


class Targets:
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


class Tap:
    """Feeds the rows that reach one consumer into the accumulators of the batch's fold."""

    def __init__(
        self,
        model: nn.Module,
        block: Block,
        calibration: Samples,
        targets: Targets | None,
        addition: Addition | None,
        calls: int,
    ):
        self.block, self.calibration, self.addition, self.calls = block, calibration, addition, calls
        self._input: torch.Tensor | None = None
        self._output: torch.Tensor | None = None
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

            def made(device: torch.device) -> BlockMoments:
                parts = [accumulator(n, targets, intercept, device, index == count - 1) for index in range(count)]
                return BlockMoments(tuple(parts[:-1]), parts[-1])

            try:
                self._accumulators = made(device)
            except RuntimeError as error:
                if not should_reduce_batch_size(error):
                    raise
                self._accumulators = made(torch.device("cpu"))
        return self._accumulators

    def start(self, index: int) -> None:
        """The rows to come belong to batch `index` (calibration batches first, held-out ones behind)."""
        self._index, self._fitted, self._left = index, len(self.calibration.fit), self.calls

    def target_hooks(self) -> tuple[Hooks, Hooks]:
        """What to call with inputs and with outputs of which modules, in a pass of the original model."""
        if self.addition is None:
            return [], [(self.block.consumer, self.add_target)]
        return self._around(self.addition, [], self._add_target_with_rest)

    def hooks(self) -> tuple[Hooks, Hooks]:
        """Likewise in a pass of the model as pruned so far."""
        if self.addition is None:
            return [(self.block.consumer, self.add)], []
        return self._around(self.addition, [(self.block.consumer, self._hold_input)], self._add_with_rest)

    def _around(self, addition: Addition, inputs: Hooks, at_sum: Callable[[Any], None]) -> tuple[Hooks, Hooks]:
        outputs: Hooks = [(self.block.consumer, self._hold_output)]
        (inputs if addition.is_input else outputs).append((addition.path, at_sum))
        return inputs, outputs

    def _hold_input(self, inputs: torch.Tensor) -> None:
        self._input = inputs.clone()  # what comes between may write into it

    def _hold_output(self, output: torch.Tensor) -> None:
        self._output = output.clone()

    def _add_target_with_rest(self, values: Any) -> None:
        output = self._output
        if (rest := self._rest(values)) is not None:
            self.add_target(output + rest)  # type: ignore[operator]

    def _add_with_rest(self, values: Any) -> None:
        if (rest := self._rest(values)) is not None:
            self.add(self._input, rest)  # type: ignore[arg-type]
            self._left -= 1
            if self._left == 0:
                stop()

    def _rest(self, values: Any) -> torch.Tensor | None:
        """What was added to the consumer's output; `None` if the consumer has not been called since the last time."""
        output, self._output = self._output, None
        return None if output is None else self.addition.rest(first_tensor(values), output)  # type: ignore

    def add_target(self, output: torch.Tensor) -> None:
        rows = self._output_rows(output)
        rows = rows.clone() if self._bias is None else rows - self._bias.detach()  # what follows may write into them
        self._targets.put(self.block.name, self._index, (rows, self._tokens()))  # type: ignore[union-attr]

    def add(self, inputs: torch.Tensor, rest: torch.Tensor | None = None) -> None:
        targets, sent = (None, None)
        if self._targets is not None:
            targets, sent = send_to_device(self._targets.pop(self.block.name, self._index), inputs.device)
        positions = output_positions(self.consumer, inputs.shape)
        mask = self.calibration.mask((*positions, 1), self._index, self.block.consumer)
        if targets is not None and sent is None:
            self._check_paired(len(targets), math.prod(positions) if mask is None else int(mask.sum()))
        if rest is not None:
            targets = targets - self._output_rows(rest)  # type: ignore[operator]
        fitted = self._index < self._fitted
        into = self.moments.folds[self._index % len(self.moments.folds)] if fitted else self.moments.held_out
        start = done = 0
        for part in input_rows(self.consumer, inputs):
            rows = part if mask is None else part[mask[start : start + len(part)].to(part.device)]
            start += len(part)
            target = None if targets is None else targets[done : done + len(rows)]
            done += len(rows)
            if len(rows) and not torch.isfinite(torch.stack(rows.aminmax())).all():  # extremes pass on missing values
                what = f"calibration batch {self._index}" if fitted else "a held-out batch"
                raise ValueError(
                    f"Block {self.block.name}: the input of {self.block.consumer} holds NaN or inf in {what}"
                    f"{self._culprits(inputs)}. Check these samples, or load the model in float32 or bfloat16."
                )
            if target is not None and sent is not None and (tokens := self._tokens()) is not None:
                # Routers of the two models may differ: only tokens that both send to this expert tell it what to do.
                here, there = common(tokens, sent)
                rows, target = rows[here], targets[there]  # type: ignore[index]
            into.update(rows, target)

    def _output_rows(self, output: torch.Tensor) -> torch.Tensor:
        shape = output.movedim(feature_axis(self.consumer), -1).shape
        return self._real(output_rows(self.consumer, output), shape)

    def _tokens(self) -> torch.Tensor | None:
        """Which tokens the rows of an expert are, in any order; `None` where all tokens pass."""
        routed = routed_tokens(self.calibration.model, self.block.consumer)
        return None if routed is None else self._real(routed[1], (len(routed[1]), 1))

    def _check_paired(self, targets: int, rows: int) -> None:
        if targets != rows:
            raise ValueError(
                f"Block {self.block.name}: {self.block.consumer} reads {rows} tokens of batch {self._index} in the "
                f"model as pruned so far, but {targets} in the original: lengths depend on what the model predicts. "
                f"Use variant='layer' or 'seq', which pair no tokens of two models."
            )

    def _culprits(self, inputs: torch.Tensor) -> str:
        """Which samples of the batch are not finite, where the first dimension counts samples."""
        if inputs.ndim < 3:
            return ""
        bad = (~torch.isfinite(inputs)).flatten(1).any(1).nonzero().flatten().tolist()
        return f", samples {bad} of the batch"

    def _real(self, rows: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        """Those rows of a tensor of `shape` that are no padding."""
        mask = self.calibration.mask(shape, self._index, self.block.consumer)
        return rows if mask is None else rows[mask.to(rows.device)]


def common(first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where in each list of tokens those are that both hold, as pairs; the second time that a token comes is another.

    Args:
        first: `(a,)` int64.
        second: `(b,)` int64.

    Returns:
        Two of equal length, int64: `first[here] == second[there]`.
    """
    orders, keys = [], []
    for tokens in (first, second):
        ordered, order = tokens.sort(stable=True)
        time = torch.arange(len(ordered), device=ordered.device) - torch.searchsorted(ordered, ordered)
        orders.append(order)
        keys.append(ordered * (len(first) + len(second)) + time)
    return orders[0][torch.isin(keys[0], keys[1])], orders[1][torch.isin(keys[1], keys[0])]
