"""The size that the user asks for, as a cost of every width of every block and a limit on their sum."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import pairwise

import torch

from ..blocks import Block, groups_of
from ..config import PruneConfig, parse_size
from ..data.batches import Samples
from ..evaluation.costs import count_macs, count_parameters, measure_latency, times_in_turn
from ..surgery.edits import narrowed

# Fractions of the units at which latency is measured, and seconds a measurement takes.
_MEASURED = (0.125, 0.25, 0.5, 0.75)
_SECONDS = 1.0

# Bytes of a safetensors file a tensor, besides its values: its name, shape and place in the header.
_HEADER = 160

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


_Costs = dict[str, tuple[float, ...]]
"""By block name, the cost at 0 ... all units."""

_Timed = tuple[_Costs, float, tuple[tuple[str, int, int, float], ...]]
"""Seconds by width, seconds of the whole model, and `Target.latencies`."""


@dataclass(frozen=True)
class Part:
    """Blocks that share one budget.

    Args:
        blocks: Names of the blocks.
        limit: On the sum of their costs.
        asked: Fraction of the cost, when the target is one.
    """

    blocks: tuple[str, ...]
    limit: float
    asked: float | None = None


@dataclass(frozen=True)
class Target:
    """What was asked for, in the unit that costs are counted in.

    Args:
        name: Of the config's field: `"keep"`, `"params"`, `"macs"`, `"latency"` or `"size"`.
        unit: Of `limit` and of costs, in words.
        limit: On the whole model; with `keep`, on the prunable blocks.
        rest: What the model costs besides the blocks.
        costs: By block name, the cost at 0 ... all units.
        parts: Blocks with a budget of their own; blocks in none are kept whole.
        latencies: What was timed: rows of unit kind, width, number of blocks narrowed, seconds.
        queries: By name of a block that has query heads as other units, the cost at 0 ... all of these.
    """

    name: str
    unit: str
    limit: float
    rest: float
    costs: dict[str, tuple[float, ...]]
    parts: tuple[Part, ...]
    latencies: tuple[tuple[str, int, int, float], ...] = ()
    queries: dict[str, tuple[float, ...]] = field(default_factory=dict)

    def cost(self, widths: dict[str, int]) -> float:
        """What the model (with `keep`: its prunable blocks) costs at these widths."""
        return self.rest + sum(self.costs[name][width] for name, width in widths.items())

    def saved(self, blocks: Sequence[Block], widths: Mapping[str, int]) -> float:
        """What blocks, some with query heads as units, cost less at these widths than whole."""
        costs = [(self.costs if block.sets == 1 else self.queries)[block.name] for block in blocks]
        return sum(cost[-1] - cost[widths[block.name]] for block, cost in zip(blocks, costs, strict=True))


def resolve(samples: Samples, blocks: Sequence[Block], configs: Sequence[PruneConfig]) -> list[Target]:
    """The target of each config on this model; widths are timed once for all of them.

    Args:
        samples: For the unpruned model; MACs and latency are counted on one batch.
        blocks: That may be pruned.
        configs: Exactly one of `keep`, `params`, `macs`, `latency` and `size` is set in each.
    """

    @cache
    def timed() -> tuple[_Timed, _Costs]:
        of_queries = _queries(blocks)
        return _latencies(samples, blocks), _latencies(samples, of_queries)[0] if of_queries else {}

    return [_target(samples, blocks, config, timed) for config in configs]


def _target(
    samples: Samples,
    blocks: Sequence[Block],
    config: PruneConfig,
    timed: Callable[[], tuple[_Timed, _Costs]],
) -> Target:
    if config.keep is not None:
        return keep_target(blocks, config)
    model, batch = samples.model, samples.measured_on
    names = tuple(b.name for b in blocks)
    of_queries = _queries(blocks)
    latencies: tuple[tuple[str, int, int, float], ...] = ()
    if config.params is not None:
        name, unit, limit, full = "params", "parameters", float(config.params), float(count_parameters(model))
        costs, queries = _parameters(blocks), _parameters(of_queries)
    elif config.size is not None:
        limit, stored_in = parse_size(config.size)
        dtype = None if stored_in is None else _DTYPES[stored_in]
        name, unit, full = "size", "bytes", float(_bytes(samples, dtype))
        costs, queries = (_sizes(samples, some, dtype) for some in (blocks, of_queries))
    elif config.macs is not None:
        name, full = "macs", float(count_macs(model, batch))
        length = batch["input_ids"].shape[1] if "input_ids" in batch else None
        unit = "multiply-accumulates a sample" + (f" of {length} tokens" if length else "")
        limit = config.macs * full if config.macs <= 1 else float(config.macs)
        costs, queries = (_macs(samples, some, full) for some in (blocks, of_queries))
    else:
        name, unit = "latency", "seconds"
        (costs, full, latencies), queries = timed()
        limit = float(config.latency or 1.0) * full
    rest = full - sum(c[-1] for c in costs.values())
    queries = _beside(queries, costs)
    return Target(name, unit, limit, rest, costs, (Part(names, limit - rest),), latencies, queries)


def keep_target(blocks: Sequence[Block], config: PruneConfig) -> Target:
    """The target of a config that sets `keep`.

    Raises:
        ValueError: it sets another target.
    """
    if config.keep is None:
        raise ValueError(f"The target must be `keep` here, not {config.target()!r}.")
    fractions = config.keep if isinstance(config.keep, dict) else dict.fromkeys(config.units, config.keep)
    groups = [[kind] for kind in fractions] if isinstance(config.keep, dict) else [list(fractions)]
    costs = _parameters(blocks)
    parts = []
    for kinds in groups:
        inside = tuple(b.name for b in blocks if b.kind in kinds)
        fraction = fractions[kinds[0]]
        parts.append(Part(inside, fraction * sum(costs[name][-1] for name in inside), fraction))
    whole = sum(costs[b.name][-1] for b in blocks if not any(b.name in part.blocks for part in parts))
    limit = whole + sum(part.limit for part in parts)
    queries = _beside(_parameters(_queries(blocks)), costs)
    return Target("keep", "prunable parameters", limit, 0.0, costs, tuple(parts), queries=queries)


def _queries(blocks: Sequence[Block]) -> list[Block]:
    return [block.queries for block in blocks if block.queries is not None]


def _beside(queries: Mapping[str, tuple[float, ...]], costs: Mapping[str, tuple[float, ...]]) -> dict:
    """Costs of query heads with that of what stays when they go, so that all of them cost as much as the block."""
    return {name: tuple(costs[name][-1] - own[-1] + cost for cost in own) for name, own in queries.items()}


def _parameters(blocks: Sequence[Block]) -> dict[str, tuple[float, ...]]:
    return {b.name: _linear(b.parameters_per_unit, b.units) for b in blocks}


def _macs(samples: Samples, blocks: Sequence[Block], full: float) -> dict[str, tuple[float, ...]]:
    model, batch = samples.model, samples.measured_on
    costs: dict[str, tuple[float, ...]] = {}
    for group in groups_of(blocks):
        tie = group.blocks
        units, least = tie[0].units, tie[0].sets
        with narrowed(model, tie, dict.fromkeys([b.name for b in tie], least)):
            fewest = count_macs(model, batch)
        per_unit = (full - fewest) / (units - least) / len(tie) if units > least else 0.0
        costs |= {block.name: _linear(per_unit, units) for block in tie}
    return costs


def _linear(per_unit: float, units: int) -> tuple[float, ...]:
    return tuple(per_unit * width for width in range(units + 1))


def _bytes(samples: Samples, dtype: torch.dtype | None) -> int:
    parameters = list(samples.model.parameters())
    return sum(p.numel() * _itemsize(p, dtype) for p in parameters) + _HEADER * len(parameters)


def _sizes(samples: Samples, blocks: Sequence[Block], dtype: torch.dtype | None) -> _Costs:
    weights = {block.name: samples.model.get_submodule(block.consumer).weight for block in blocks}
    return {
        b.name: _linear(b.parameters_per_unit * _itemsize(weights[b.name], dtype), b.units)  # type: ignore[arg-type]
        for b in blocks
    }


def _itemsize(tensor: torch.Tensor, dtype: torch.dtype | None) -> int:
    return dtype.itemsize if dtype is not None and tensor.is_floating_point() else tensor.element_size()


def _latencies(samples: Samples, blocks: Sequence[Block]) -> _Timed:
    """Seconds by block and width, seconds of the whole model, and the table of what was measured.

    Blocks of one kind and size are narrowed together, which adds up what each saves above the noise, and share it.
    """
    model, batch = samples.model, samples.measured_on
    full = measure_latency(model, batch, _SECONDS)
    families: dict[tuple[str, int, int], list[Block]] = {}
    for group in groups_of(blocks):
        tie = group.blocks
        families.setdefault((tie[-1].kind, tie[-1].units, tie[-1].parameters_per_unit), []).extend(tie)
    costs: dict[str, tuple[float, ...]] = {}
    table: list[tuple[str, int, int, float]] = []
    for (kind, units, _), family in families.items():
        sets = family[0].sets
        widths = sorted({sets * max(1, round(f * units / sets)) for f in _MEASURED} - {units})
        seconds = []
        for width in widths:
            fewer = partial(narrowed, model, family, dict.fromkeys([b.name for b in family], width))
            timed = times_in_turn(model, batch, fewer, _SECONDS)
            seconds.append(full * timed.inside / timed.outside)
            table.append((kind, width, len(family), seconds[-1]))
        curve = _fit_costs(widths, [(full - s) / len(family) for s in seconds], units)
        costs |= {block.name: curve for block in family}
    return costs, full, tuple(table)


def _fit_costs(widths: Sequence[int], saved: Sequence[float], units: int) -> tuple[float, ...]:
    """Cost at 0 ... `units` from the time saved at some widths: linear in between, never falling with the width."""
    knots = [*zip(widths, saved, strict=True), (units, 0.0)]
    if len(knots) > 1:  # on to zero units along the first piece
        (x0, y0), (x1, y1) = knots[:2]
        knots.insert(0, (0, y0 + (y0 - y1) / (x1 - x0) * x0))
    most = 0.0
    falling: list[tuple[int, float]] = []
    for width, value in reversed(knots):
        most = max(most, value)
        falling.insert(0, (width, most))
    costs = []
    for (x0, y0), (x1, y1) in pairwise(falling):
        costs += [most - (y0 + (y1 - y0) * (x - x0) / (x1 - x0)) for x in range(x0, x1)]
    return (*costs, most)
