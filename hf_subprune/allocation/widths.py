"""From what was asked for and what blocks lose to the width of every block."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

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
from .families import Families
from .propagation import Points
from .targets import Part, Target

# No block keeps less than this part of what an equal share would be: where others are pruned as far, the errors of a
# block of a few units are no longer those that were measured on it alone.
_FLOOR = 0.1

# The automatic rounding of widths, and finer ones where it misses the target by more than `_SLACK` of it: even widths
# are stored in a stock config and should suit any kernel.
_EVEN_STEPS, _RAGGED_STEPS = (64, 8, 1), (8, 1)
_SLACK = 0.005

# Grouped matrix products, which run stacked experts, take rows of whole 16 bytes only.
_STACKED_STEP = 8


def multiple(block: Block, step: int, *, asked: bool) -> int:
    """What a block's width is a multiple of.

    Args:
        block: Whose width it is.
        step: That widths are rounded to where blocks have enough units.
        asked: Whether it is what the user asked for, whom any block of one step obeys.
    """
    if block.kind == "attention":
        return 1
    step = (step if block.units >= step else 1) if asked else rounding(block.units, step)
    return step if block.stack is None else math.lcm(step, _STACKED_STEP)


def _steps(config: PruneConfig, even: bool) -> tuple[int, ...]:
    """What widths are rounded to: the first that comes near enough to the target."""
    if config.round_to is not None:
        return (config.round_to,)
    return _EVEN_STEPS if even else _RAGGED_STEPS


def choose_widths(
    blocks: Sequence[Block],
    target: Target,
    config: PruneConfig,
    families: Families,
    losses: Mapping[str, Points] | None = None,
) -> dict[str, int]:
    """The width of every block, by name.

    Args:
        blocks: That may be pruned.
        target: What they may cost.
        config: Its `budget` and `round_to` are read.
        families: How blocks are tied.
        losses: Predicted loss of each block in a part of the target; not needed for budget `"uniform"`.

    Raises:
        ValueError: the target cannot be met; the message says what can.
    """
    widths = {block.name: block.units for block in blocks}
    for part in target.parts:
        inside = [block for block in blocks if block.name in part.blocks]
        if config.allocation() == "uniform":
            left = [block for block in inside if block.name not in families.gone]
            widths |= dict.fromkeys(families.gone & {block.name for block in inside}, 0)
            if left:
                some = part if len(left) == len(inside) else replace(part, asked=None)
                widths |= _uniform(left, some, target, config)
        else:
            chosen = _ByLoss(part, target, config, families, losses or {}, {}).share(inside)
            widths |= {name: width for name, (_, width) in chosen.items()}
    return widths


def choose_units(
    blocks: Sequence[Block],
    target: Target,
    config: PruneConfig,
    families: Families,
    losses: Mapping[str, Points],
    queries: Mapping[str, Points],
) -> dict[str, tuple[Block, int]]:
    """By name, the block or its `queries`, and how many units of it to keep.

    Args:
        blocks: That may be pruned.
        target: What they may cost.
        config: As for `choose_widths`, of another budget than `"uniform"`.
        families: How blocks are tied.
        losses: Predicted loss of each block in a part of the target.
        queries: Of the blocks that may lose query heads instead: predicted loss by number of these.

    Raises:
        ValueError: as `choose_widths`.
    """
    chosen = {block.name: (block, block.units) for block in blocks}
    for part in target.parts:
        inside = [block for block in blocks if block.name in part.blocks]
        chosen |= _ByLoss(part, target, config, families, losses, queries).share(inside)
    return chosen


def check_target(blocks: Sequence[Block], target: Target, config: PruneConfig, families: Families) -> dict[str, int]:
    """Refuse what cannot be reached, before any calibration.

    Returns:
        Widths by block name that meet the target, chosen as if all blocks lost alike.

    Raises:
        ValueError: as `choose_widths`.
    """
    return choose_widths(blocks, target, config, families, {b.name: ((b.units, 0.0),) for b in blocks})


def _uniform(blocks: Sequence[Block], part: Part, target: Target, config: PruneConfig) -> dict[str, int]:
    step, asked = config.round_to or _EVEN_STEPS[0], config.round_to is not None
    units, steps = [b.units for b in blocks], [multiple(b, step, asked=asked) for b in blocks]
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


@dataclass(frozen=True)
class _ByLoss:
    """One part of a target, shared out by what blocks lose.

    Args:
        part: Of the target.
        target: What blocks may cost.
        config: Its `budget` and `round_to` are read.
        families: How blocks are tied.
        losses: Predicted loss of each block.
        queries: Of the blocks that may lose query heads instead: predicted loss by number of these.
    """

    part: Part
    target: Target
    config: PruneConfig
    families: Families
    losses: Mapping[str, Points]
    queries: Mapping[str, Points]

    def share(self, blocks: Sequence[Block]) -> dict[str, tuple[Block, int]]:
        """By name, the block or its query heads, and how many units it keeps.

        Of the roundings in turn, the first one counts that comes near enough to the target, else the nearest.
        """
        if not blocks:
            return {}
        families = self.families.of(blocks)
        full, limit = sum(self.target.costs[block.name][-1] for block in blocks), self.part.limit
        share = min(1.0, limit / full) if full > 0 else 1.0
        search = least_loss if self.config.allocation() == "global" else equal_loss
        steps = _steps(self.config, self.families.even)
        tried: list[tuple[float, list[tuple[int, int]]]] = []
        for step in steps:
            choices = self._widths(families, step, share)
            if sum(family.costs[0] for family in choices) > limit * (1 + 1e-9):
                continue  # finer steps may do
            chosen = search(choices, limit)
            cost = sum(one.costs[one.widths.index(name)] for one, name in zip(choices, chosen, strict=True))
            tried.append((cost, chosen))
            if cost >= (1 - _SLACK) * min(limit, full):
                break
        if not tried:
            raise ValueError(self._out_of_reach(families, steps[-1], share, full))
        _, chosen = max(tried, key=lambda one: one[0])
        found: dict[str, tuple[Block, int]] = {}
        for family, (sets, width) in zip(families, chosen, strict=True):
            for block in family:
                found[block.name] = (block if block.queries is None or sets == block.sets else block.queries, width)
        return found

    def _widths(self, families: Sequence[Sequence[Block]], step: int, share: float) -> list[Choices]:
        """The widths of each family where about this share of all is kept."""
        return [undominated(tie([self._choices(block, step, share) for block in family])) for family in families]

    def _choices(self, block: Block, step: int, share: float) -> Choices:
        """The widths of a block, named by the number of sets of its units and how many units are kept."""
        costs = self.target.costs[block.name]
        if block.name in self.families.gone:
            return Choices(((block.sets, 0),), (costs[0],), (0.0,))
        if block.name in self.families.whole:
            return Choices(((block.sets, block.units),), (costs[-1],), (0.0,))
        step = multiple(block, step, asked=self.config.round_to is not None)
        multiples = allowed_widths(block.units, step, none=self._may_go(block))
        widths = tuple(width for width in multiples if not 0 < width < _FLOOR * share * block.units)
        predicted = zip(widths, interpolate(self.losses[block.name], widths), strict=True)
        options = [(costs[width], (block.sets, width), loss) for width, loss in predicted]
        if block.queries is not None:
            sets, of_queries = block.queries.sets, self.target.queries.get(block.name, ())
            options += [(of_queries[width], (sets, width), loss) for width, loss in self.queries.get(block.name, ())]
        said = [option for option in sorted(options) if (block.name, *option[1]) not in self.families.refused]
        return Choices(*zip(*((name, cost, loss) for cost, name, loss in said), strict=True))

    def _may_go(self, block: Block) -> bool:
        """Whether the block may keep no unit because others would lose more, which must be known."""
        known = self.losses[block.name][0][0] == 0
        return known and block.removable and self.families.let_blocks_go(self.config.allocation())

    def _out_of_reach(self, families: Sequence[Sequence[Block]], step: int, share: float, full: float) -> str:
        """What to say where the smallest widths are too many for this share of the full cost."""
        part, target = self.part, self.target

        def least(share: float) -> float:
            return sum(family.costs[0] for family in self._widths(families, step, share))

        smallest = target.limit + least(share) - part.limit
        advice = "Ask for that much at least."
        if target.name == "keep":
            while least(share) > share * full * (1 + 1e-9):  # the more is kept, the more of each block
                share = math.ceil(1e4 * least(share) / full) / 1e4
            advice = f"Keep at least {share}."
        return (
            f"{target.name}={part.asked or getattr(self.config, target.name)} is out of reach: it allows "
            f"{target.limit:.6g} {target.unit}, and the smallest width of every block makes {smallest:.6g}. {advice}"
        )
