"""How long a run takes, and how much it holds, foretold from few forwards and products of matrices on this machine.

What a run does is forwards over its samples, products of what its blocks read (moments) and factorisations of these.
How many of each a stage comes to is a constant here, counted on the demo's encoder and on SmolLM2-135M in CPU seconds
of one process, so that the figures are right to a factor, not to a second.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from ..blocks import Block
from ..config import TWO_STREAMS, PruneConfig
from ..data.batches import Samples, brief, entries
from ..models.linears import linear_of, matrix_shape
from ..models.running import Batch, call, hooked, input_device, on_device
from ..runs.stages import CHECKING, FINDING, LOSSES, MEASURING, ORIGINAL, SENSITIVITIES, SHARING, SOLVING, expect
from .losses import STANDING_FOR_ALL

# Forwards over all samples that a stage comes to, whatever else it does.
_FORWARDS = {ORIGINAL: 0.3, SENSITIVITIES: 0.6, LOSSES: 1.2, SHARING: 0.03, CHECKING: 0.03, MEASURING: 0.35}
# Forwards of the probe that blocks are found by.
_TRIALS = 45.0
# Those of solving, by what is observed of which model.
_PASSES = {"layer": 1.0, "seq": 2.0, "asym": 2.0, "residual": 2.0}
# Products of two square matrices of a block's columns that its curve takes, a greedy selection, and all else of it.
_PRODUCTS_A_CURVE, _PRODUCTS_A_SELECTION, _PRODUCTS_BESIDES = 4.0, 4.5, 1.5
# Columns of the matrices whose product is timed, and tokens of the forward that is.
_TIMED, _TIMED_TOKENS = 512, 512
# Forwards that are timed, of which the first takes longer.
_TIMES = 2


def foretell(samples: Samples, candidates: Iterable[Block], config: PruneConfig, curves: bool) -> None:
    """Tell those who are shown the run what its stages are expected to take, from the survey on."""
    expect(partial(stage_seconds, samples, kinds_of(candidates), config, curves))


def foretell_roughly(samples: Samples, config: PruneConfig) -> None:
    """Tell them while blocks are not found yet, which are guessed; and how long it takes to find them."""

    def seconds() -> dict[str, float]:
        curves = config.allocation() != "uniform" and len(config.units) > 1
        return {
            FINDING: _TRIALS * _timed_forward(samples.model, samples.probe),
            **stage_seconds(samples, _guessed(samples.model), config, curves),
        }

    expect(seconds)


def kinds_of(blocks: Iterable[Block]) -> dict[str, str]:
    """By dotted path of each block's consumer, the kind of its units."""
    return {block.consumer: block.kind for block in blocks}


def _guessed(model: torch.nn.Module) -> dict[str, str]:
    """Like `kinds_of`, before blocks are found: linears that put out what most do, which is the residual stream."""
    shapes = {path: matrix_shape(module) for path, module in model.named_modules() if linear_of(module) is not None}
    ((stream, _),) = Counter(outputs for _, outputs in shapes.values()).most_common(1) or [(0, 0)]
    return {path: f"of {inputs} inputs" for path, (inputs, outputs) in shapes.items() if outputs == stream}


def stage_seconds(
    samples: Samples, consumers: Mapping[str, str], config: PruneConfig, curves: bool
) -> dict[str, float]:
    """Seconds that the stages of a run take, from the survey on.

    Args:
        samples: Of which a part of one batch is run.
        consumers: Of the blocks that may shrink: by dotted path, the kind of their units.
        config: Of the run.
        curves: Whether it makes curves of what blocks lose.
    """
    rows, forward = _forwards(samples, consumers)
    device = input_device(samples.model)
    shapes = {path: matrix_shape(samples.model.get_submodule(path)) for path in consumers}
    single, double = (_seconds_a_product(dtype, device) for dtype in (torch.float32, _double(device)))

    def moments(some: Iterable[str]) -> float:
        return sum(rows[path] * n * (n + m) * single for path in some for n, m in [shapes[path]])

    def solutions(some: Iterable[str], products: float) -> float:
        return sum(products * shapes[path][0] ** 3 * double for path in some)

    seconds = {stage: forwards * forward for stage, forwards in _FORWARDS.items()}
    if not config.reads_sensitivities(curves):
        seconds[SENSITIVITIES] = 0.0
    looked_at = _looked_at(consumers) if config.is_even() else list(consumers)
    made = moments(looked_at) + solutions(looked_at, _PRODUCTS_A_CURVE)
    seconds[LOSSES] = seconds[LOSSES] + made if curves else 0.0
    products = _PRODUCTS_A_SELECTION * (config.importance == "greedy") + _PRODUCTS_BESIDES
    passes = _PASSES[config.streams()]
    seconds[SOLVING] = passes * forward + moments(consumers) + solutions(consumers, products)
    return seconds


def _looked_at(consumers: Mapping[str, str]) -> list[str]:
    """Of each kind as many as stand for all, where layers are alike."""
    kinds: dict[str, list[str]] = {}
    for path, kind in consumers.items():
        kinds.setdefault(kind, []).append(path)
    return [path for paths in kinds.values() for path in paths[:STANDING_FOR_ALL]]


def _forwards(samples: Samples, consumers: Iterable[str]) -> tuple[dict[str, int], float]:
    """Rows that each consumer reads, and seconds, of forwards over all samples: those of a part, multiplied."""
    batches = sorted([*samples.fit, *samples.held_out], key=entries)
    batch = brief(batches[len(batches) // 2], _TIMED_TOKENS)
    share = sum(map(entries, batches)) / entries(batch)
    with _counted(samples, consumers) as rows:
        spent = _timed_forward(samples.model, batch)
    return {path: round(share * count / _TIMES) for path, count in rows.items()}, share * spent


@contextmanager
def _counted(samples: Samples, consumers: Iterable[str]) -> Iterator[dict[str, int]]:
    """Rows that each consumer reads in the forwards within."""
    rows = dict.fromkeys(consumers, 0)

    def count(path: str, x: torch.Tensor) -> None:
        rows[path] += x.numel() // x.shape[-1] if x.ndim < 4 else x.numel() // x.shape[1]

    with hooked(samples.model, inputs=[(path, partial(count, path)) for path in rows]):
        yield rows


def rows_an_entry(samples: Samples, consumers: Iterable[str]) -> dict[str, float]:
    """Rows that each consumer reads for each entry of a batch: those of a small forward; of texts, a row a token."""
    batch = samples.short_probe
    if not any(isinstance(value, torch.Tensor) and value.is_floating_point() for value in batch.values()):
        return dict.fromkeys(consumers, 1.0)
    with _counted(samples, consumers) as rows:
        call(samples.model, on_device(samples.model, batch))
    return {path: count / entries(batch) for path, count in rows.items()}


def bytes_of_states(samples: Samples, candidates: Iterable[Block], config: PruneConfig) -> int:
    """At most: what is kept of all samples between the layers, twice while a layer runs."""
    rows = rows_an_entry(samples, [block.consumer for block in candidates])
    outputs = {path: matrix_shape(samples.model.get_submodule(path))[1] for path in rows}
    widest = max((rows[path] * outputs[path] for path in rows), default=0.0)
    streams = 2 if config.streams() in TWO_STREAMS else 1
    total = sum(map(entries, [*samples.fit, *samples.held_out]))
    return math.ceil(2 * streams * total * widest) * samples.model.dtype.itemsize


def _timed_forward(model: Any, batch: Batch) -> float:
    """Seconds of a forward that is not the first, which takes longer."""
    batch = on_device(model, batch)
    times = []
    for _ in range(_TIMES):
        start = time.perf_counter()
        call(model, batch)
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


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
