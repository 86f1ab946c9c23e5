"""What a model costs: parameters, multiply-accumulates, latency."""

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from ..data.probe import is_divisible
from ..models.forms import apart, together
from ..models.precision import as_deployed
from ..models.running import Batch, inside, on_device, undisturbed

# Blocks of runs, or turns, that a median latency is taken over, whatever time that takes.
_FEWEST_BLOCKS = 3

LATENCY_ROUNDS = 10
"""Forwards of each of several models that are timed in turn."""


@dataclass(frozen=True)
class Costs:
    """What a model costs, whatever it runs on.

    Args:
        parameters: Tied ones counted once.
        macs: Multiply-accumulates of one forward on one sample.
    """

    parameters: int
    macs: int


def count_parameters(model: PreTrainedModel) -> int:
    """Number of parameters, tied ones counted once."""
    return model.num_parameters()


def count_macs(model: PreTrainedModel, batch: Batch) -> int:
    """Multiply-accumulates of one forward on the batch's first sample, at the batch's (padded) length.

    Matrix products, convolutions and attention scores are counted, a causal mask saves nothing. A batch whose tensors
    do not share their first dimension (patches of several images in one list) is counted as a whole. Of stacked
    experts, those that the router chooses for a token are counted.
    """
    sample = {name: value[:1] for name, value in batch.items()} if is_divisible(batch) else batch
    # The counter knows no formula for the fused attention of CPUs.
    formulas = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
    counter = FlopCounterMode(display=False, custom_mapping=formulas)
    # Nor for grouped products, which run stacked experts.
    with undisturbed(model), apart(inside(model)), torch.no_grad(), counter:
        model.requires_grad_(False)  # the counter follows gradients, of which there are none
        model(**on_device(model, sample))
    return counter.get_total_flops() // 2


def _attention_flops(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    batch, heads, length, width = query
    return 2 * batch * heads * length * key[-2] * (width + value[-1])


def measure_latency(model: PreTrainedModel, batch: Batch, min_run_time: float = 0.2) -> float:
    """Median seconds of a forward on one batch, after a warm-up.

    Args:
        model: On whatever device it is to be measured.
        batch: Forward arguments; moved to that device before the clock starts.
        min_run_time: Seconds to measure for, at least.
    """
    batch = on_device(model, batch)

    def run() -> None:
        model(**batch)
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()

    with undisturbed(model), together(inside(model)), as_deployed(), torch.inference_mode():
        run()
        timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
        times = timer.blocked_autorange(min_run_time=min_run_time).times
        while len(times) < _FEWEST_BLOCKS:
            times = times + timer.blocked_autorange(min_run_time=min_run_time).times
    return statistics.median(times)


def circumstances(model: PreTrainedModel, batch: Batch) -> dict[str, Any]:
    """What a latency depends on: batch size, length (`None` for images), device, dtype, threads."""
    ids = batch.get("input_ids")
    return {
        "batch_size": len(next(value for value in batch.values() if _is_batched(value))),
        "length": None if ids is None else ids.shape[1],
        "device": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else model.device.type,
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
    }


def measure_in_turn(
    models: Sequence[PreTrainedModel], batch: Batch, rounds: int = LATENCY_ROUNDS
) -> list[list[float]]:
    """Seconds of forwards of several models in turn, so that whatever else runs slows all of them down alike.

    Args:
        models: Each on whatever device it is to be measured.
        batch: Forward arguments.
        rounds: Forwards of each model, after one to warm up.

    Returns:
        `rounds` lists of one time a model.
    """
    return [[_seconds(model, batch) for model in models] for _ in range(rounds + 1)][1:]


def _seconds(model: PreTrainedModel, batch: Batch) -> float:
    batch = on_device(model, batch)
    with undisturbed(model), together(inside(model)), as_deployed(), torch.inference_mode():
        start = time.perf_counter()
        model(**batch)
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        return time.perf_counter() - start


class InTurn(NamedTuple):
    """Seconds of a forward of a model that is changed in every other turn.

    Args:
        outside: Median of the model as it is.
        inside: Median of the changed one.
        ratios: Least and largest ratio, changed over as it is, of one turn.
    """

    outside: float
    inside: float
    ratios: tuple[float, float]


def times_in_turn(
    model: PreTrainedModel,
    batch: Batch,
    changed: Callable[[], AbstractContextManager[None]],
    min_run_time: float,
) -> InTurn:
    """Seconds of a forward outside and inside of `changed`, in turns: what else runs slows both down alike.

    Args:
        model: On whatever device it is to be measured.
        batch: Forward arguments.
        changed: Within it the model is another one.
        min_run_time: Seconds to measure for, at least.
    """
    turns: list[tuple[float, float]] = []
    while len(turns) <= _FEWEST_BLOCKS or sum(map(sum, turns[1:])) < min_run_time:
        outside = _seconds(model, batch)
        with changed():
            turns.append((outside, _seconds(model, batch)))
    outsides, insides = zip(*turns[1:], strict=True)  # the first turn warms up
    ratios = [inside / outside for outside, inside in turns[1:]]
    return InTurn(statistics.median(outsides), statistics.median(insides), (min(ratios), max(ratios)))


def count(model: PreTrainedModel, batch: Batch) -> Costs:
    """Parameters, and multiply-accumulates on the batch's first sample."""
    return Costs(count_parameters(model), count_macs(model, batch))


def _is_batched(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim > 0
