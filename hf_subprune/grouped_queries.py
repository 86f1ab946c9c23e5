"""Whether grouped-query attention loses whole key/value heads, or as many query heads of each of them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from .blocks import Block
from .calibrated import Calibrated
from .collection import BlockMoments
from .config import PruneConfig
from .curves import expected_loss
from .durable import once
from .layout import choose_layout
from .moments import combine
from .problem import columns_of
from .processes import from_all, is_mine
from .solver import choose
from .stacked import together
from .targets import Target, narrowed


def better_units(
    calibrated: Calibrated, blocks: Sequence[Block], widths: Mapping[str, int], config: PruneConfig
) -> tuple[list[Block], dict[str, int]]:
    """For each block that could lose query heads instead of key/value heads, the units that lose less.

    Both are tried on the original model at what the budget allows the block: the key/value heads that it was given,
    and as many query heads as cost no more. Where all layers are to be stored with one width, they decide together.

    Args:
        calibrated: The model and its moments.
        blocks: To prune, in forward order.
        widths: Units that each keeps, by name.
        config: One of those that it was calibrated for.

    Returns:
        The blocks, some with query heads as units, and how many units each of them keeps, by name.
    """
    target = calibrated.target(config)
    heads = {b.name: kept for b in blocks if (kept := _affordable(b, widths[b.name], target, config))}
    offered = [b for b in blocks if b.name in heads]
    if not offered:
        return list(blocks), dict(widths)
    even = _is_even(calibrated, blocks, widths, config)
    if even and not _loads_as_stock(calibrated, *_replaced(blocks, widths, heads)):
        return list(blocks), dict(widths)
    folder = calibrated.folder
    gains = once(
        None if folder is None else folder / "query_heads.pt",
        lambda: _gains(calibrated, offered, widths, heads, config),
    )
    families: dict[object, list[str]] = {}
    for block in offered:
        families.setdefault((block.kind, tuple(block.columns.shape)) if even else block.name, []).append(block.name)
    better = {name for family in families.values() if sum(gains[name] for name in family) > 0 for name in family}
    return _replaced(blocks, widths, {name: kept for name, kept in heads.items() if name in better})


def _affordable(block: Block, width: int, target: Target, config: PruneConfig) -> int:
    """Query heads that cost no more than the block's budget, the same number of each group; 0 if there are none."""
    if block.queries is None or block.tie is not None:
        return 0
    limit = target.costs[block.name][width]
    if config.allocation() == "uniform":
        # Rounding down to whole key/value heads may have left much of the fraction unused.
        asked = [part.asked for part in target.parts if block.name in part.blocks and part.asked is not None]
        limit = max([limit, *(fraction * target.costs[block.name][-1] for fraction in asked)])
    sets, costs = block.queries.sets, target.queries[block.name]
    return max((n for n in range(sets, block.queries.units, sets) if costs[n] <= limit * (1 + 1e-9)), default=0)


def _replaced(
    blocks: Sequence[Block], widths: Mapping[str, int], heads: Mapping[str, int]
) -> tuple[list[Block], dict[str, int]]:
    """The blocks, with query heads as units where their number is given, and the numbers of units that they keep."""
    chosen = [b.queries if b.queries is not None and b.name in heads else b for b in blocks]
    return chosen, {**widths, **heads}


def _is_even(calibrated: Calibrated, blocks: Sequence[Block], widths: Mapping[str, int], config: PruneConfig) -> bool:
    """Whether all layers are to have one width that the model's config says."""
    if config.layout == "auto" and config.allocation() == "uniform":
        return _loads_as_stock(calibrated, blocks, widths)
    return config.layout == "stock"


def _loads_as_stock(calibrated: Calibrated, blocks: Sequence[Block], widths: Mapping[str, int]) -> bool:
    model = calibrated.model
    with narrowed(model, blocks, widths), together(model):
        try:
            choose_layout(model, "stock", inputs=calibrated.probe).undo()
        except ValueError:
            return False
    return True


def _gains(
    calibrated: Calibrated,
    blocks: Sequence[Block],
    widths: Mapping[str, int],
    heads: Mapping[str, int],
    config: PruneConfig,
) -> dict[str, float]:
    """By block name, the logarithm of what whole key/value heads lose over what query heads lose."""
    gains: dict[str, float] = {}
    for block, moments in calibrated.moments(blocks, replace(config, variant="layer"), {}):
        if moments is not None and block.queries is not None and is_mine(calibrated.owners[block.name]):
            whole = _loss(calibrated, block, moments, widths[block.name], config)
            queries = _loss(calibrated, block.queries, moments, heads[block.name], config)
            gains[block.name] = math.log(max(whole, 1e-30) / max(queries, 1e-30))
    return {name: gain for theirs in from_all(gains) for name, gain in theirs.items()}


def _loss(calibrated: Calibrated, block: Block, moments: BlockMoments, width: int, config: PruneConfig) -> float:
    problem = calibrated.problem(block, moments)
    choice = choose(
        combine(problem.folds),
        problem.W,
        problem.groups,
        width,
        sets=problem.sets,
        shrinkage=config.shrinkage,
        importance=config.importance,
        method=config.method,
        swaps=None if config.swaps < 0 else config.swaps,
        output_metric=problem.output_metric,
        gradient=problem.gradient,
        generator=torch.Generator().manual_seed(config.seed),
    )
    return expected_loss(
        problem.folds,
        problem.W,
        columns_of(choice.kept, problem.groups),
        shrinkage=config.shrinkage,
        output_metric=problem.output_metric,
        reweight_kept=config.reweight,
    )
