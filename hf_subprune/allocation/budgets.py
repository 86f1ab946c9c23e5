"""How many units each block keeps. Numbers only: no model, no data."""

import heapq
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

# So many combinations of widths are looked at one by one.
_MOST_COMBINATIONS = 50_000

# The automatic rounding is used where a block has at least this many steps of it.
_FEWEST_STEPS = 16


@dataclass(frozen=True)
class Choices:
    """The widths that one block, or several blocks tied to one width, may have.

    Args:
        widths: Units kept, or other names for what is, by ascending cost; the last is the full width.
        costs: Cost at each width, ascending.
        losses: Predicted loss at each width; 0 at the full width.
    """

    widths: tuple[Any, ...]
    costs: tuple[float, ...]
    losses: tuple[float, ...]


def uniform_widths(units: Sequence[int], fraction: float, multiple: int | Sequence[int] = 1) -> list[int]:
    """The same kept fraction in every block, met from below.

    Args:
        units: Number of units of each block.
        fraction: Of the units to keep, in (0, 1]; 1 keeps everything, whatever the multiple.
        multiple: Widths are rounded down to a multiple of this many units; one for all blocks, or one each.

    Returns:
        The number of units that each block keeps; 0 where the fraction is too small for a single multiple.
    """
    if fraction == 1:
        return list(units)
    multiples = [multiple] * len(units) if isinstance(multiple, int) else multiple
    exact = [math.floor(fraction * count + 1e-9) for count in units]
    return [width - width % step for width, step in zip(exact, multiples, strict=True)]


def rounding(units: int, preferred: int) -> int:
    """`preferred` where a block has enough units for steps of that size to be fine ones, else 1."""
    return preferred if units >= _FEWEST_STEPS * preferred else 1


def allowed_widths(units: int, multiple: int, *, none: bool = False) -> tuple[int, ...]:
    """Multiples of `multiple`, one multiple at least, and the full width.

    Args:
        units: Of the block.
        multiple: What widths are rounded to.
        none: Whether the block may go: then the first width is 0.
    """
    return (*((0,) if none else ()), *range(min(multiple, units), units, multiple), units)


def interpolate(points: Sequence[tuple[int, float]], widths: Sequence[int]) -> tuple[float, ...]:
    """Losses at `widths` between measured `(width, loss)` points, ascending; constant outside of them.

    Losses are made to fall with the width first (monotone envelope): a wider block is never worse, as measured losses
    may say by chance. In between they fall by equal parts for equal widths, as errors decay exponentially with the
    units kept (El Halabi et al. 2022, section 4); evenly towards a loss of 0. A loss at width 0 is taken as it is:
    what a block that is not there loses is measured by other means.
    """
    falling: list[tuple[int, float]] = []
    for width, loss in reversed(points):
        falling.append((width, max(loss, falling[-1][1] if falling else 0.0)))
    falling.reverse()
    losses, right = [], 0
    for width in widths:
        if width == points[0][0] == 0:
            losses.append(points[0][1])
            continue
        while right < len(falling) - 1 and falling[right][0] < width:
            right += 1
        (x1, y1), (x0, y0) = falling[right], falling[max(right - 1, 0)]
        share = min(max((width - x0) / (x1 - x0), 0.0), 1.0) if x1 > x0 else 1.0
        losses.append(y0 * (y1 / y0) ** share if y0 > 0 and y1 > 0 else y0 + share * (y1 - y0))
    return tuple(losses)


def least_loss(choices: Sequence[Choices], budget: float) -> list[Any]:
    """Widths of the least total loss whose total cost is within the budget (`global`).

    Where they are few, all combinations are looked at. Else every block starts at its smallest width. Steps on the
    lower convex hulls of the blocks' curves of loss against cost are taken, the steepest first, while they fit. This
    is the optimum of the hulls up to the last step, and no block could be one step wider.

    Raises:
        ValueError: the smallest widths exceed the budget.
    """
    if math.prod(len(c.widths) for c in choices) <= _MOST_COMBINATIONS:
        return _best_combination(choices, budget)
    rates = [_hull_rates(c) for c in choices]
    return _grow(choices, budget, [0] * len(choices), lambda block, at: rates[block][at])


def _best_combination(choices: Sequence[Choices], budget: float) -> list[Any]:
    """The combination of least total loss, and of those that lose alike the dearest."""
    options = [list(zip(c.losses, c.costs, c.widths, strict=True)) for c in choices]
    best: tuple[float, float] | None = None
    widths: list[Any] = []
    for combination in itertools.product(*options):
        cost = sum(option[1] for option in combination)
        rank = (sum(option[0] for option in combination), -cost)
        if cost <= budget * (1 + 1e-9) and (best is None or rank < best):
            best, widths = rank, [option[2] for option in combination]
    if best is None:
        least = sum(c.costs[0] for c in choices)
        raise ValueError(f"The smallest widths cost {least:.6g}, the budget is {budget:.6g}.")
    return widths


def equal_loss(choices: Sequence[Choices], budget: float) -> list[Any]:
    """The smallest widths at which no block alone loses more than a common amount, the least that the budget allows.

    After Kuzmin et al., arXiv 1912.09802. What the budget leaves goes to the blocks that lose most.

    Raises:
        ValueError: the smallest widths exceed the budget.
    """
    amounts = sorted({loss for c in choices for loss in c.losses})

    def within(amount: float) -> list[int]:
        return [next(i for i, loss in enumerate(c.losses) if loss <= amount) for c in choices]

    def cost(indices: Sequence[int]) -> float:
        return sum(c.costs[i] for c, i in zip(choices, indices, strict=True))

    low, high = 0, len(amounts) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if cost(within(amounts[middle])) <= budget else (middle + 1, high)
    return _grow(choices, budget, within(amounts[low]), lambda block, at: choices[block].losses[at])


def equal_fraction(
    units: Sequence[int], multiples: Sequence[int], cost: Callable[[Sequence[int]], float], budget: float
) -> list[int]:
    """The widths of the largest common fraction whose cost is within the budget (`uniform`).

    Args:
        units: Number of units of each block.
        multiples: Rounding of each block's width.
        cost: Of widths.
        budget: To be met from below.

    Returns:
        Widths; 0 where even the smallest fraction that leaves every block a unit is too dear.
    """
    if cost(units) <= budget:
        return list(units)
    low, high = 0.0, 1.0
    while high - low > 1e-7:
        middle = (low + high) / 2
        low, high = (middle, high) if cost(uniform_widths(units, middle, multiples)) <= budget else (low, middle)
    return uniform_widths(units, low, multiples)


def tie(choices: Sequence[Choices]) -> Choices:
    """The choices of blocks that must have one width: costs and losses add up.

    Raises:
        ValueError: the blocks' widths differ.
    """
    if len({c.widths for c in choices}) > 1:
        raise ValueError("Only blocks of the same widths can be tied to one width.")
    costs = tuple(map(sum, zip(*(c.costs for c in choices), strict=True)))
    losses = tuple(map(sum, zip(*(c.losses for c in choices), strict=True)))
    return Choices(choices[0].widths, costs, losses)


def undominated(choices: Choices) -> Choices:
    """The choices but for those that lose more than a cheaper one."""
    kept: list[int] = []
    for index, loss in enumerate(choices.losses):
        if not kept or loss <= choices.losses[kept[-1]]:
            kept.append(index)
    fields = (choices.widths, choices.costs, choices.losses)
    return Choices(*(tuple(field[i] for i in kept) for field in fields))


def _hull_rates(choices: Choices) -> list[float]:
    """For each step from one width to the next: loss saved per cost, on the lower convex hull."""
    points = list(zip(choices.costs, choices.losses, strict=True))
    hull: list[int] = []
    for i in range(len(points)):
        while len(hull) > 1 and _rate(points[hull[-2]], points[hull[-1]]) <= _rate(points[hull[-1]], points[i]):
            hull.pop()
        hull.append(i)
    rates = []
    for a, b in pairwise(hull):
        rates += [_rate(points[a], points[b])] * (b - a)
    return rates


def _rate(a: tuple[float, float], b: tuple[float, float]) -> float:
    return (a[1] - b[1]) / (b[0] - a[0]) if b[0] > a[0] else math.inf


def _grow(
    choices: Sequence[Choices], budget: float, start: Sequence[int], priority: Callable[[int, int], float]
) -> list[Any]:
    """Widen blocks step by step, the highest priority first, while they fit."""
    at = list(start)
    spent = sum(c.costs[i] for c, i in zip(choices, at, strict=True))
    if spent > budget * (1 + 1e-9):
        raise ValueError(f"The smallest widths cost {spent:.6g}, the budget is {budget:.6g}.")
    heap = [(-priority(b, i), b) for b, i in enumerate(at) if i + 1 < len(choices[b].widths)]
    heapq.heapify(heap)
    while heap:
        _, block = heapq.heappop(heap)
        costs, i = choices[block].costs, at[block]
        if spent + costs[i + 1] - costs[i] > budget * (1 + 1e-9):
            continue  # what is left may do for a cheaper block
        spent += costs[i + 1] - costs[i]
        at[block] = i + 1
        if i + 2 < len(costs):
            heapq.heappush(heap, (-priority(block, i + 1), block))
    return [c.widths[i] for c, i in zip(choices, at, strict=True)]
