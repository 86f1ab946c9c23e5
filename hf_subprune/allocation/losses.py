"""One pass over the original model: what each block would lose at every width, and its moments where they are kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from ..blocks import Group, groups_of
from ..collection.block_moments import BlockMoments
from ..collection.walk import Walk
from ..runs.processes import from_all, is_mine
from ..runs.workspace import Workspace
from ..solver.curves import LossCurve, loss_curve, losses_of_sets
from ..solver.problem import Problem
from ..solver.tied import order_together
from .budgets import interpolate
from .propagation import TRIAL_FRACTIONS, Points, Propagation, Quality, fill_in, measured_blocks
from .survey import Survey


@dataclass(frozen=True)
class _Losses:
    """What is found of each block, by name.

    Args:
        curves: Error of the block's output at every width.
        factors: Drift of the model's output over that error, of the blocks that were pruned alone.
        points: Losses that were measured themselves, by the caller's `evaluation`.
        queries: Error at every number of query heads.
    """

    curves: dict[str, LossCurve] = field(default_factory=dict)
    factors: dict[str, float] = field(default_factory=dict)
    points: dict[str, Points] = field(default_factory=dict)
    queries: dict[str, Points] = field(default_factory=dict)

    def update(self, other: _Losses) -> None:
        """Add what another process has found."""
        for name, values in vars(self).items():
            values.update(getattr(other, name))


def with_losses(
    survey: Survey,
    evaluation: Quality | None,
    work: Workspace,
    *,
    curves: bool,
    keep: bool,
) -> Survey:
    """The survey with curves and losses, if budgets need them, and with moments that are kept.

    Args:
        survey: Without them.
        evaluation: Measures losses in place of the drift of the model's output.
        work: Where losses are kept.
        curves: Whether losses are needed.
        keep: Whether moments stay in memory.
    """
    stored: dict[str, BlockMoments] | None = {} if keep else None
    trials = Propagation(survey.samples, evaluation) if curves else None
    found = work.once("curves", lambda: _pass_over(survey, trials, stored, work))
    factors = fill_in(survey.candidates, found.factors)
    losses = {name: tuple((w, factors[name] * e) for w, e in curve.points) for name, curve in found.curves.items()}
    losses |= found.points
    return replace(
        survey,
        curves=found.curves,
        losses=losses,
        query_losses={name: _scaled(found.curves[name], losses[name], own) for name, own in found.queries.items()},
        stored=stored,
    )


def _scaled(curve: LossCurve, losses: Points, queries: Points) -> Points:
    """Losses of query heads in the unit of those of whole key/value heads."""
    width, loss = losses[0]
    (own,) = interpolate(curve.points, [width])
    factor = loss / own if own > 0 else 1.0
    return tuple((w, factor * e) for w, e in queries)


def _pass_over(
    survey: Survey, trials: Propagation | None, stored: dict[str, BlockMoments] | None, work: Workspace
) -> _Losses:
    found = _Losses()
    groups = {block.name: group for group in groups_of(survey.candidates) for block in group.blocks}
    waiting: dict[str, list[tuple[Problem, int]]] = {}
    everywhere = trials is not None and trials.evaluation is not None
    measured = set(groups) if everywhere else measured_blocks(survey.candidates)
    walk = Walk(survey.samples, survey.plan, survey.owners)
    with work.bar(len(survey.plan.segments), "Calibrating") as bar:
        for segment in walk.left:
            with work.clock("calibration"):
                walk.start(segment)
            for block in segment.blocks:
                with work.clock("calibration"):
                    moments = walk.moments([block])[block.name]
                if not is_mine(survey.owners[block.name]):
                    continue
                if stored is not None:
                    stored[block.name] = moments
                if trials is None:
                    continue
                group = groups[block.name]
                together = waiting.setdefault(group.blocks[0].name, [])
                together.append((survey.problem(block, moments, last=stored is None), moments.rows))
                del moments
                if len(together) == len(group.blocks):
                    found.update(_look_at(survey, group, together, trials if block.name in measured else None, work))
                    del waiting[group.blocks[0].name]
                del together
            bar.update()
    for theirs in from_all(found):
        found.update(theirs)
    return found


def _look_at(
    survey: Survey,
    group: Group,
    problems: Sequence[tuple[Problem, int]],
    trials: Propagation | None,
    work: Workspace,
) -> _Losses:
    """Curves and losses of blocks that share units or a width, which are pruned for trial where `trials` are given."""
    found = _Losses()
    blocks, names = group.blocks, [block.name for block in group.blocks]
    with work.clock("curves"):
        curves = _curves(survey, group, problems, () if trials is None else TRIAL_FRACTIONS)
        first = blocks[0]
        if first.queries is not None and group.share != "units":
            queries = replace(problems[0][0], groups=first.queries.columns, sets=first.queries.sets)
            found.queries[first.name] = losses_of_sets(queries, survey.settings)
    with work.clock("propagation"):
        if trials is not None and trials.evaluation is not None:
            found.points.update(dict.fromkeys(names, trials.points(blocks, curves)))
        elif trials is not None:
            found.factors.update(dict.fromkeys(names, trials.factor(blocks, curves)))
    for name, curve in zip(names, curves, strict=True):
        curve.trials.clear()
        found.curves[name] = curve
    return found


def _curves(
    survey: Survey, group: Group, problems: Sequence[tuple[Problem, int]], fractions: Sequence[float]
) -> list[LossCurve]:
    settings = survey.settings
    order = order_together([problem for problem, _ in problems], settings) if group.share == "units" else None
    curves = [loss_curve(problem, settings, trial_fractions=fractions, order=order) for problem, _ in problems]
    if group.share != "width":
        return curves
    total = sum(rows for _, rows in problems)
    return [curve.of_share(rows / total) for curve, (_, rows) in zip(curves, problems, strict=True)]
