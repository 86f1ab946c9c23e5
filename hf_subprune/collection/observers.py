"""What is taken from the inputs and outputs of one block's consumer as batches run by, for each variant."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import send_to_device
from accelerate.utils.memory import should_reduce_batch_size

from ..blocks import Block
from ..data.batches import Samples
from ..models.experts import routed_tokens
from ..models.linears import feature_axis, input_rows, matrix_shape, output_positions, output_rows
from ..models.offload import device_of
from ..models.running import around, stop
from ..runs.store import Store
from .additions import Addition, first_tensor
from .block_moments import FOLDS, BlockMoments, accumulator
from .endings import Ending, Shell

# Of the energy of a sample's median token: beyond it, tokens are outliers.
_MASSIVE = 10

Hooks = list[tuple[str, Callable[[Any], None]]]
"""Paths of modules, and what to call with the input or output of each."""


class Targets:
    """What consumers put out in the original model, until the pruned one has come as far.

    Args:
        store: Of the outputs.

    Attributes:
        blocks: Names of those whose outputs have come.
        size: Bytes of outputs that have come.
    """

    def __init__(self, store: Store):
        self.store, self.blocks, self.size = store, set[str](), 0
        self._waiting: dict[tuple[str, int], list[Any]] = defaultdict(list)

    def again(self) -> Targets:
        """The same to be taken once more, of those that are in memory: these here stay."""
        other = Targets(self.store)
        other._waiting.update((key, list(waiting)) for key, waiting in self._waiting.items())
        return other

    def put(self, block: str, index: int, target: tuple[torch.Tensor, torch.Tensor | None]) -> None:
        """Keep one call's target of batch `index`."""
        waiting = self._waiting[block, index]
        self.blocks.add(block)
        self.size += target[0].numel() * target[0].element_size()
        waiting.append(self.store.keep(f"{block}-{index}-{len(waiting)}", target))

    def pop(self, block: str, index: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The targets in the order in which they came."""
        kept = self._waiting[block, index].pop(0)
        target = self.store.read(kept)
        self.store.drop(kept)
        return target


class Observer:
    """Feeds the rows that reach one consumer into the accumulators of the batch's fold (variants `layer` and `seq`).

    Where the consumer's output is added to a stream that goes through a norm, a row counts as what reads the stream
    sees it, relative to the energy of its token there: any row where nothing but the norm reads the stream, else those
    of tokens with massive activations.

    Args:
        samples: Whose batches run, and their model.
        block: What is observed.
        calls: How often one forward calls its consumer.
        addition: Where the sum is that the consumer's output goes into, if it is of interest.
        ends: Whether a forward may end once all rows were seen.

    Attributes:
        ending: What is told what the segment ends with, where that is this sum.
        shell: What is told what the modules around the consumer put out, for passes that come.
    """

    outputs: int | None = None
    """Number of targets a row, where these come from another model."""

    def __init__(
        self, samples: Samples, block: Block, calls: int, addition: Addition | None = None, *, ends: bool = False
    ):
        self.samples, self.block, self.calls, self.addition, self.ends = samples, block, calls, addition, ends
        self.consumer: Any = samples.model.get_submodule(block.consumer)
        self.ending: Ending | None = None
        self.shell: Shell | None = None
        self._moments: BlockMoments | None = None
        self._input: torch.Tensor | None = None
        self._output: torch.Tensor | None = None

    @property
    def moments(self) -> BlockMoments:
        """Of the rows seen so far; memory is taken when they are first asked for."""
        if self._moments is None:
            device = device_of(self.consumer.weight)
            try:
                self._moments = self._made(device)
            except RuntimeError as error:
                if not should_reduce_batch_size(error):
                    raise
                self._moments = self._made(torch.device("cpu"))
        return self._moments

    def _made(self, device: torch.device) -> BlockMoments:
        n, _ = matrix_shape(self.consumer)
        intercept = getattr(self.consumer, "bias", None) is not None
        count = min(FOLDS, len(self.samples.fit)) + 1
        parts = [accumulator(n, self.outputs, intercept, device, index == count - 1) for index in range(count)]
        return BlockMoments(tuple(parts[:-1]), parts[-1])

    @property
    def stops(self) -> bool:
        """Whether it ends a forward of the pruned model itself, behind the consumer."""
        return self.ends and self.addition is not None

    def start(self, index: int) -> None:
        """The rows to come belong to batch `index` (calibration batches first, held-out ones behind)."""
        self._index, self._fitted, self._left = index, len(self.samples.fit), self.calls

    def hooks(self) -> tuple[Hooks, Hooks]:
        """What to call with inputs and with outputs of which modules, in a pass of the model as pruned so far."""
        if self.addition is None:
            return [(self.block.consumer, self.add)], []
        inputs, outputs = self._around(self.addition, [(self.block.consumer, self._hold_input)], self._add_at_sum)
        return inputs, outputs if self.shell is None else [*outputs, *self.shell.hooks()]

    def add(self, inputs: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Rows of one call of the consumer.

        Args:
            inputs: Of the consumer.
            weights: Of its real tokens.
        """
        into = self._fold()
        done = 0
        for rows in self._real_inputs(inputs):
            into.update(rows, None, None if weights is None else weights[done : done + len(rows)])
            done += len(rows)

    def _around(self, addition: Addition, inputs: Hooks, at_sum: Callable[[Any], None]) -> tuple[Hooks, Hooks]:
        outputs: Hooks = [(self.block.consumer, self._hold_output)]
        (inputs if addition.is_input else outputs).append((addition.path, at_sum))
        return inputs, outputs

    def _hold_input(self, inputs: torch.Tensor) -> None:
        self._input = inputs.clone()  # what comes between may write into it

    def _hold_output(self, output: torch.Tensor) -> None:
        self._output = output.clone()
        if self.shell is not None:
            self.shell.begin(output)

    def _add_at_sum(self, values: Any) -> None:
        output, self._output = self._output, None
        if output is None:  # the consumer has not been called since the last time
            return
        self._add_held(first_tensor(values), output)  # type: ignore[arg-type]
        if self.ending is not None:
            self.ending.hold(self._index, self._input, output, values)  # type: ignore[arg-type]
        if self.shell is not None:
            self.shell.hold(self._index, self._input)  # type: ignore[arg-type]
        self._left -= 1
        if self._left == 0 and self.ends:
            stop()

    def _add_held(self, total: torch.Tensor, output: torch.Tensor) -> None:
        """The rows of the call that gave `output`, which has become part of the sum `total`."""
        self.add(self._input, weights=self._weights(total))  # type: ignore[arg-type]

    def _weights(self, total: torch.Tensor) -> torch.Tensor | None:
        """`(rows,)` float32: how much each token counts; `None` where the sum goes through no norm.

        A norm divides by the energy of a token. Where all of the sum goes through it, a token's error counts so. Where
        the sum goes on beside the norm, tokens count alike, but for those that hold thousands of times the energy of
        others (massive activations, Sun et al. 2024), whose errors would count for all: beyond `_MASSIVE` times the
        median of the sample's tokens, errors count relative to the energy.
        """
        addition: Any = self.addition
        if not addition.normed:
            return None
        if addition.only_normed:
            energy = self._output_rows(total).float().square().sum(1)
            return torch.where(energy > 0, 1 / energy, 0.0)
        shape = self._positions(total)
        energy = output_rows(self.consumer, total).float().square().sum(1)
        mask = self.samples.mask(shape, self._index, self.block.consumer)
        real = energy if mask is None else energy.masked_fill(~mask.to(energy.device), math.nan)
        of_samples = real.view(shape[0] if len(shape) > 2 else 1, -1)
        most = _MASSIVE * of_samples.nanmedian(1, keepdim=True).values.expand_as(of_samples).flatten()
        weights = torch.where((energy > most) & (most > 0), most / energy, 1.0)
        return weights if mask is None else weights[mask.to(weights.device)]

    def _output_rows(self, output: torch.Tensor) -> torch.Tensor:
        return self._real(output_rows(self.consumer, output), self._positions(output))

    def _positions(self, output: torch.Tensor) -> torch.Size:
        """The shape of an output of the consumer, features last."""
        return output.movedim(feature_axis(self.consumer), -1).shape

    def _real(self, rows: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        """Those rows of a tensor of `shape` that are no padding."""
        mask = self.samples.mask(shape, self._index, self.block.consumer)
        return rows if mask is None else rows[mask.to(rows.device)]

    def _real_inputs(self, inputs: torch.Tensor) -> Iterator[torch.Tensor]:
        """The rows of the consumer's inputs that are no padding, in parts."""
        mask = self._mask_of(inputs)
        start = 0
        for part in input_rows(self.consumer, inputs):
            rows = part if mask is None else part[mask[start : start + len(part)].to(part.device)]
            start += len(part)
            self._check_finite(rows, inputs)
            yield rows

    def _mask_of(self, inputs: torch.Tensor) -> torch.Tensor | None:
        positions = output_positions(self.consumer, inputs.shape)
        return self.samples.mask((*positions, 1), self._index, self.block.consumer)

    def _fold(self) -> Any:
        folds = self.moments.folds
        return folds[self._index % len(folds)] if self._index < self._fitted else self.moments.held_out

    def _check_finite(self, rows: torch.Tensor, inputs: torch.Tensor) -> None:
        if len(rows) and not torch.isfinite(torch.stack(rows.aminmax())).all():  # extremes pass on missing values
            what = f"calibration batch {self._index}" if self._index < self._fitted else "a held-out batch"
            raise ValueError(
                f"Block {self.block.name}: the input of {self.block.consumer} holds NaN or inf in {what}"
                f"{_culprits(inputs)}. Check these samples, or load the model in float32 or bfloat16."
            )


class PairedObserver(Observer):
    """Rows of the pruned model with targets of the original (variant `asym`).

    Args:
        samples, block, calls, addition, ends: As of `Observer`.
        targets: Where the original's outputs wait.
    """

    def __init__(
        self,
        samples: Samples,
        block: Block,
        calls: int,
        addition: Addition | None = None,
        *,
        ends: bool = False,
        targets: Targets,
    ):
        super().__init__(samples, block, calls, addition, ends=ends)
        _, self.outputs = matrix_shape(self.consumer)
        self._bias = getattr(self.consumer, "bias", None)
        self._targets = targets

    def target_hooks(self) -> tuple[Hooks, Hooks]:
        """What to call with inputs and with outputs of which modules, in a pass of the original model."""
        return [], [(self.block.consumer, self.add_target)]

    def add_target(self, output: torch.Tensor) -> None:
        """What one call of the consumer puts out in the original model."""
        self._put(self._output_rows(output))

    def _put(self, rows: torch.Tensor) -> None:
        rows = rows.clone() if self._bias is None else rows - self._bias.detach()  # what follows may write into them
        self._targets.put(self.block.name, self._index, (rows, self._tokens()))

    def add(self, inputs: torch.Tensor, weights: torch.Tensor | None = None, rest: torch.Tensor | None = None) -> None:
        """Rows of one call, with their targets.

        Args:
            inputs: Of the consumer.
            weights: Of its real tokens.
            rest: `(rows, m)` at its real tokens, what else the sum holds that the targets are of.
        """
        targets, sent = send_to_device(self._targets.pop(self.block.name, self._index), inputs.device)
        if sent is None:
            mask, positions = self._mask_of(inputs), output_positions(self.consumer, inputs.shape)
            self._check_paired(len(targets), math.prod(positions) if mask is None else int(mask.sum()))
        if rest is not None:
            targets = targets - rest
        into = self._fold()
        done = 0
        for rows in self._real_inputs(inputs):
            target = targets[done : done + len(rows)]
            weight = None if weights is None else weights[done : done + len(rows)]
            done += len(rows)
            if sent is not None and (tokens := self._tokens()) is not None:
                # Routers of the two models may differ: only tokens that both send to this expert tell it what to do.
                here, there = common(tokens, sent)
                rows, target = rows[here], targets[there]
            into.update(rows, target, weight)

    def _tokens(self) -> torch.Tensor | None:
        """Which tokens the rows of an expert are, in any order; `None` where all tokens pass."""
        routed = routed_tokens(around(self.samples.model, self.block.consumer), self.block.consumer)
        return None if routed is None else self._real(routed[1], (len(routed[1]), 1))

    def _check_paired(self, targets: int, rows: int) -> None:
        if targets != rows:
            raise ValueError(
                f"Block {self.block.name}: {self.block.consumer} reads {rows} tokens of batch {self._index} in the "
                f"model as pruned so far, but {targets} in the original: lengths depend on what the model predicts. "
                f"Use variant='layer' or 'seq', which pair no tokens of two models."
            )


class ResidualObserver(PairedObserver):
    """Rows and targets as of `PairedObserver`, for the sum that the consumer's output goes into (`residual`).

    The target holds, besides, by how much the rest of that sum, as pruned so far, falls short of the original's.
    """

    addition: Addition

    def target_hooks(self) -> tuple[Hooks, Hooks]:
        return self._around(self.addition, [], self._add_target_at_sum)

    def _add_target_at_sum(self, values: Any) -> None:
        output, self._output = self._output, None
        if output is not None:
            self._put(self._output_rows(output) + self._rest(first_tensor(values), output))  # type: ignore[arg-type]

    def _add_held(self, total: torch.Tensor, output: torch.Tensor) -> None:
        self.add(self._input, self._weights(total), self._rest(total, output))  # type: ignore[arg-type]

    def _rest(self, total: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        of_rows = replace(self.addition, gain=self.addition.gain.flatten())
        return of_rows.rest(self._output_rows(total), self._output_rows(output))


def _culprits(inputs: torch.Tensor) -> str:
    """Which samples of the batch are not finite, where the first dimension counts samples."""
    if inputs.ndim < 3:
        return ""
    bad = (~torch.isfinite(inputs)).flatten(1).any(1).nonzero().flatten().tolist()
    return f", samples {bad} of the batch"


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
