"""How long a run takes, foretold from one forward and one product of matrices on this machine.

What a run does is forwards over its samples, products of what its blocks read (moments) and factorisations of these.
How many of each a stage comes to is a constant here, so that the figures are right to a factor, not to a second.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from ..blocks import Block
from ..config import PruneConfig
from ..data.batches import Samples
from ..models.linears import matrix_shape
from ..models.running import call, hooked, input_device
from ..runs.stages import CHECKING, LOSSES, MEASURING, ORIGINAL, SENSITIVITIES, SHARING, SOLVING, expect

# Forwards over all samples that a stage comes to, whatever else it does.
_FORWARDS = {ORIGINAL: 0.3, SENSITIVITIES: 0.5, LOSSES: 2.3, SHARING: 0.02, CHECKING: 0.1, MEASURING: 0.6}
# Those of solving, by what is observed of which model.
_PASSES = {"layer": 1.0, "seq": 2.0, "asym": 3.0, "residual": 3.0}
# Products of two square matrices of a block's columns that its curve takes, and its solution.
_PRODUCTS_A_CURVE, _PRODUCTS_A_SOLUTION = 4.0, 12.0
# Blocks of a kind that curves are made of.
_CURVES = 5
# Columns of the matrices whose product is timed.
_TIMED = 512


def foretell(samples: Samples, candidates: Sequence[Block], config: PruneConfig, curves: bool) -> None:
    """Tell those who are shown the run what its stages are expected to take."""
    expect(partial(stage_seconds, samples, candidates, config, curves))


def stage_seconds(
    samples: Samples, candidates: Sequence[Block], config: PruneConfig, curves: bool
) -> dict[str, float]:
    """Seconds that the stages of a run take, from the survey on.

    Args:
        samples: Of which one batch is run.
        candidates: Blocks that may shrink.
        config: Of the run.
        curves: Whether it makes curves of what blocks lose.
    """
    rows, forward = _one_forward(samples, candidates)
    device = input_device(samples.model)
    shapes = {block.name: matrix_shape(samples.model.get_submodule(block.consumer)) for block in candidates}
    single, double = (_seconds_a_product(dtype, device) for dtype in (torch.float32, _double(device)))

    def moments(blocks: Sequence[Block]) -> float:
        return sum(rows[b.consumer] * n * (n + m) * single for b in blocks for n, m in [shapes[b.name]])

    def solutions(blocks: Sequence[Block], products: float) -> float:
        return sum(products * shapes[b.name][0] ** 3 * double for b in blocks)

    seconds = {stage: forwards * forward for stage, forwards in _FORWARDS.items()}
    looked_at = _looked_at(candidates)
    made = moments(looked_at) + solutions(looked_at, _PRODUCTS_A_CURVE)
    seconds[LOSSES] = seconds[LOSSES] + made if curves else 0.0
    passes = _PASSES[config.streams()]
    seconds[SOLVING] = passes * forward + moments(candidates) + solutions(candidates, _PRODUCTS_A_SOLUTION)
    return seconds


def _looked_at(candidates: Sequence[Block]) -> list[Block]:
    kinds: dict[str, list[Block]] = {}
    for block in candidates:
        kinds.setdefault(block.kind, []).append(block)
    return [block for blocks in kinds.values() for block in blocks[:_CURVES]]


def _one_forward(samples: Samples, candidates: Sequence[Block]) -> tuple[dict[str, int], float]:
    """Rows that each consumer reads, and seconds, of forwards over all samples: those of one batch, multiplied."""
    batches = sorted([*samples.fit, *samples.held_out], key=entries)
    batch = batches[len(batches) // 2]
    share = sum(map(entries, batches)) / entries(batch)
    rows: dict[str, int] = dict.fromkeys((block.consumer for block in candidates), 0)

    def counted(path: str, x: torch.Tensor) -> None:
        rows[path] += x.numel() // x.shape[-1] if x.ndim < 4 else x.numel() // x.shape[1]

    with hooked(samples.model, inputs=[(path, partial(counted, path)) for path in rows]):
        start = time.perf_counter()
        call(samples.model, batch)
        spent = time.perf_counter() - start
    return {path: round(share * count) for path, count in rows.items()}, share * spent


def entries(batch: Mapping[str, Any]) -> int:
    """Numbers in a batch, of its largest tensor: tokens, pixels."""
    return max(value.numel() for value in batch.values() if isinstance(value, torch.Tensor))


def _double(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def _seconds_a_product(dtype: torch.dtype, device: torch.device) -> float:
    """Seconds of a multiply-accumulate in a product of matrices of middling size."""
    x = torch.ones(_TIMED, _TIMED, dtype=dtype, device=device)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        float((x @ x)[0, 0])  # waits for the device
        times.append(time.perf_counter() - start)
    return min(times) / _TIMED**3
