"""From what was asked for and what blocks lose to the width of every block."""

import math
from collections.abc import Mapping, Sequence

from ..blocks import Block
from ..config import PruneConfig
from .budgets import (
    Choices,
    allowed_widths,
    equal_fraction,
    equal_loss,
    interpolate,
    least_loss,
    rounding,
    tie,
    undominated,
    uniform_widths,
)
from .propagation import Points
from .targets import Part, Target

# No block keeps less than this part of what an equal share would be: where others are pruned as far, the errors of a
# block of a few units are no longer those that were measured on it alone.
_FLOOR = 0.1

# The automatic rounding of widths: even ones are stored in a stock config and should suit any kernel.
_EVEN_STEP, _RAGGED_STEP = 64, 8

# Grouped matrix products, which run stacked experts, take rows of whole 16 bytes only.
_STACKED_STEP = 8


def multiple(block: Block, config: PruneConfig) -> int:
    """What a block's width is a multiple of."""
    if block.kind == "attention":
        return 1
    if config.round_to is not None:
        step = config.round_to if block.units >= config.round_to else 1
    else:
        even = config.allocation() == "uniform" or config.layout == "stock"
        step = rounding(block.units, _EVEN_STEP if even else _RAGGED_STEP)
    return step if block.stack is None else math.lcm(step, _STACKED_STEP)


def choose_widths(
    blocks: Sequence[Block], target: Target, config: PruneConfig, losses: Mapping[str, Points] | None = None
) -> dict[str, int]:
    """The width of every block, by name.

    Args:
        blocks: That may be pruned.
        target: What they may cost.
        config: Its `budget`, `layout` and `round_to` are read.
        losses: Predicted loss of each block in a part of the target; not needed for budget `"uniform"`.

    Raises:
        ValueError: the target cannot be met; the message says what can.
    """
    widths = {block.name: block.units for block in blocks}
    for part in target.parts:
        inside = [block for block in blocks if block.name in part.blocks]
        if config.allocation() == "uniform":
            widths |= _uniform(inside, part, target, config)
        else:
            chosen = _by_loss(inside, part, target, config, losses or {}, {})
            widths |= {name: width for name, (_, width) in chosen.items()}
    return widths


def choose_units(
    blocks: Sequence[Block],
    target: Target,
    config: PruneConfig,
    losses: Mapping[str, Points],
    queries: Mapping[str, Points],
) -> dict[str, tuple[Block, int]]:
    """By name, the block or its `queries`, and how many units of it to keep.

    Args:
        blocks: That may be pruned.
        target: What they may cost.
        config: As for `choose_widths`, of another budget than `"uniform"`.
        losses: Predicted loss of each block in a part of the target.
        queries: Of the blocks that may lose query heads instead: predicted loss by number of these.

    Raises:
        ValueError: as `choose_widths`.
    """
    chosen = {block.name: (block, block.units) for block in blocks}
    for part in target.parts:
        inside = [block for block in blocks if block.name in part.blocks]
        chosen |= _by_loss(inside, part, target, config, losses, queries)
    return chosen


def check_target(blocks: Sequence[Block], target: Target, config: PruneConfig) -> dict[str, int]:
    """Refuse what cannot be reached, before any calibration.

    Returns:
        Widths by block name that meet the target, chosen as if all blocks lost alike.

    Raises:
        ValueError: as `choose_widths`.
    """
    return choose_widths(blocks, target, config, {b.name: ((b.units, 0.0),) for b in blocks})


def _uniform(blocks: Sequence[Block], part: Part, target: Target, config: PruneConfig) -> dict[str, int]:
    units, steps = [b.units for b in blocks], [multiple(b, config) for b in blocks]
    names = [b.name for b in blocks]

    def cost(widths: Sequence[int]) -> float:
        return sum(target.costs[name][width] for name, width in zip(names, widths, strict=True))

    if part.asked is not None:
        widths = uniform_widths(units, part.asked, steps)
    else:
        widths = equal_fraction(units, steps, cost, part.limit)
    if 0 in widths:
        block, step = blocks[widths.index(0)], steps[widths.index(0)]
        raise ValueError(
            f"{target.name}={part.asked or getattr(config, target.name)} would leave block {block.name} with none of "
            f"its {block.units} {block.kind} units (in multiples of {step}): keep at least {step / block.units:.4g}, "
            f"leave the block whole with exclude={[block.name]!r}, or let blocks differ with budget='global' and "
            f"layout='ragged'."
        )
    return dict(zip(names, widths, strict=True))


def _by_loss(
    blocks: Sequence[Block],
    part: Part,
    target: Target,
    config: PruneConfig,
    losses: Mapping[str, Points],
    queries: Mapping[str, Points],
) -> dict[str, tuple[Block, int]]:
    full = sum(target.costs[block.name][-1] for block in blocks)
    share = min(1.0, part.limit / full) if full > 0 else 1.0
    choices = []
    for block in blocks:
        least_width = _FLOOR * share * block.units
        widths = tuple(w for w in allowed_widths(block.units, multiple(block, config)) if w >= least_width)
        predicted = zip(widths, interpolate(losses[block.name], widths), strict=True)
        options = [(target.costs[block.name][w], (block.sets, w), loss) for w, loss in predicted]
        if block.queries is not None:
            sets, costs = block.queries.sets, target.queries.get(block.name, ())
            options += [(costs[w], (sets, w), loss) for w, loss in queries.get(block.name, ())]
        costs, names, falling = zip(*sorted(options), strict=True)
        choices.append(Choices(names, costs, falling))
    tied: dict[object, list[int]] = {}
    for index, block in enumerate(blocks):
        key = (block.kind, block.units) if config.layout == "stock" else block.tie or block.stack or index
        tied.setdefault(key, []).append(index)
    families = [undominated(tie([choices[i] for i in members])) for members in tied.values()]
    least = sum(family.costs[0] for family in families)
    if least > part.limit * (1 + 1e-9):
        smallest = target.limit + least - part.limit
        advice = "Ask for that much at least."
        if target.name == "keep":
            advice = f"Keep at least {math.ceil(1e4 * least / sum(f.costs[-1] for f in families)) / 1e4}."
        raise ValueError(
            f"{target.name}={part.asked or getattr(config, target.name)} is out of reach: it allows "
            f"{target.limit:.6g} {target.unit}, and the smallest width of every block makes {smallest:.6g}. {advice}"
        )
    chosen = (least_loss if config.allocation() == "global" else equal_loss)(families, part.limit)
    found: dict[str, tuple[Block, int]] = {}
    for members, (sets, width) in zip(tied.values(), chosen, strict=True):
        for block in (blocks[i] for i in members):
            found[block.name] = (block if block.queries is None or sets == block.sets else block.queries, width)
    return found
