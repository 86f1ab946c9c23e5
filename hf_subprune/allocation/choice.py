"""Choose the width of every block for one size, and which of its units are removed under grouped-query attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from ..blocks import Block
from ..config import PruneConfig
from ..evaluation.costs import times_in_turn
from ..report.records import Allocation, Change
from ..runs.processes import from_process
from ..runs.stages import SHARING, begin
from ..runs.workspace import Workspace
from ..surgery.edits import narrowed
from .query_heads import alternatives, better_units, units_by_loss
from .survey import LATENCY_SECONDS, Survey
from .widths import choose_widths

# A latency target is met when what is measured lies between this fraction of it and the target.
_LATENCY_SLACK = 0.94
_LATENCY_TRIES = 5


@dataclass(frozen=True, eq=False)
class Widths:
    """Who keeps how much.

    Args:
        config: The size that was asked for.
        blocks: That lose units, in forward order; some with query heads as units in place of key/value heads.
        kept: By name of every block that may be pruned, the number of units that it keeps.
    """

    config: PruneConfig
    blocks: Sequence[Block]
    kept: Mapping[str, int]

    def reached(self, survey: Survey, latency: Change | None) -> float:
        """What the pruned model costs, in the target's unit; for a latency target, from the `latency` measured."""
        target = survey.target(self.config)
        if target.name == "latency" and latency is not None:
            return survey.full_cost(target) * latency.ratio
        return survey.full_cost(target) - target.saved(self.blocks, self.kept)

    def allocation(self, survey: Survey, reached: float) -> Allocation:
        """The target, what was reached, and how it was shared out, for the report."""
        target = survey.target(self.config)
        return Allocation(
            budget=self.config.allocation(),
            target=target.name,
            unit=target.unit,
            limit=target.limit,
            reached=reached,
            predicted_drift=survey.predicted_loss(self.blocks, self.kept) if survey.losses else None,
            latencies=target.latencies,
            alternatives=alternatives(survey, self.config, self.blocks, self.kept),
        )


def choose(survey: Survey, config: PruneConfig, work: Workspace) -> Widths:
    """The width of every block for the size of one of the survey's configs.

    Args:
        survey: Of the model as it is.
        config: One of those that it was taken for.
        work: Where what is compared on the way is kept.

    Raises:
        ValueError: the target cannot be met; the message says what can.
    """
    begin(SHARING)
    with work.clock("allocation"):
        return Widths(config, *better_units(survey, whole_heads(survey, config), config, work))


def whole_heads(survey: Survey, config: PruneConfig) -> dict[str, int]:
    """The width of every block, by name, where grouped-query attention loses whole key/value heads."""
    target, losses = survey.target(config), survey.predicted()
    families = survey.families_of(config)
    if families.even and target.name != "latency":
        return from_process(0, units_by_loss(survey, target, config)[1])
    widths = choose_widths(survey.blocks, target, config, families, losses)
    if target.name != "latency":
        return from_process(0, widths)
    # What blocks save together is not quite the sum of what was timed: aim again at what was missed.
    aimed = target
    tried: list[tuple[bool, float, dict[str, int]]] = []
    for _ in range(_LATENCY_TRIES):
        fewer = partial(narrowed, survey.model, survey.blocks, widths)
        timed = times_in_turn(survey.model, survey.samples.measured_on, fewer, LATENCY_SECONDS)
        taken = survey.full_cost(target) * timed.inside / timed.outside
        tried.append((taken <= target.limit, -abs(taken - target.limit), widths))
        if _LATENCY_SLACK * target.limit <= taken <= target.limit:
            break
        (part,) = aimed.parts
        limit = part.limit + (1 + _LATENCY_SLACK) / 2 * target.limit - taken
        aimed = replace(aimed, parts=(replace(part, limit=limit),))
        try:
            widths = choose_widths(survey.blocks, aimed, config, families, losses)
        except ValueError:
            break
    *_, nearest = max(tried, key=lambda one: one[:2])
    return from_process(0, nearest)
