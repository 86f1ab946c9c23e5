"""One pass over the original model: what each block would lose at every width, and its moments where they are kept."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ..blocks import Block, Group, groups_of
from ..collection.block_moments import FOLDS, BlockMoments
from ..collection.observers import Targets
from ..collection.planning import plan
from ..collection.stream import Rest
from ..collection.walk import SurveyWalk
from ..config import TWO_STREAMS
from ..data.batches import tokens_in
from ..models.linears import matrix_shape
from ..runs.processes import from_all, from_process, is_mine
from ..runs.stages import LOSSES, steps
from ..runs.store import Store
from ..runs.workspace import Workspace
from ..solver.curves import LossCurve, loss_curve, losses_of_sets
from ..solver.problem import Problem
from ..solver.tied import order_together
from .budgets import interpolate
from .propagation import TRIAL_FRACTIONS, Points, Propagation, Quality, corrected, fill_in, measured_blocks, spread
from .survey import Survey

# Blocks of a family that gets one width whose curves are made, each in the middle of its part of the depth.
STANDING_FOR_ALL = 5
# Rows that curves are made of for each column of the widest block, and at least, if there are as many.
_ROWS_A_COLUMN = 2
_FEWEST_ROWS = 4096
# Blocks of a kind that are left out alone, and blocks that are left out one after the other.
_LEFT_OUT = 8
# What is left of the loss of a block that is not there once the consumers behind it are fitted: of the attention of
# SmolLM2-135M, behind its first two layers, .3 to .8 where only the next MLP is.
_MENDED = 0.5
# Bytes of what blocks put out in the original that are kept until they are solved; beyond that, it runs again then.
_TARGET_BYTES = 200 * 2**20


@dataclass(frozen=True)
class _Losses:
    """What is found of each block, by name.

    Args:
        curves: Error of the block's output at every width.
        factors: Drift of the model's output over that error, by width, of the blocks that were pruned alone.
        points: Losses that were measured themselves, by the caller's `evaluation`.
        queries: Error at every number of query heads.
    """

    curves: dict[str, LossCurve] = field(default_factory=dict)
    factors: dict[str, Points] = field(default_factory=dict)
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
    """The survey with curves and losses, if budgets need them, and with moments or outputs that are kept.

    Args:
        survey: Without them.
        evaluation: Measures losses in place of the drift of the model's output.
        work: Where losses are kept.
        curves: Whether losses are needed.
        keep: Whether moments stay in memory.
    """
    stored: dict[str, BlockMoments] | None = {} if keep else None
    trials = Propagation(survey.samples, survey.plan.segments, evaluation) if curves else None
    looked_at = _looked_at(survey) if curves else set()
    passed = _Pass(survey, looked_at, trials, stored, work)
    found = work.once("curves", passed.run)
    factors = fill_in([block for block in survey.candidates if block.name in found.curves], found.factors)
    predicted = {name: corrected(curve.points, factors[name]) for name, curve in found.curves.items()}
    losses = {name: tuple(point for point in points if point[0]) for name, points in predicted.items()}
    if trials is not None and trials.batches and survey.may_leave_out():
        # Drifts differ a little from process to process, and what is chosen by them must not.
        absent = from_process(0, work.once("absent", lambda: _absent(survey, trials, predicted, work)))
        losses |= {name: ((0, loss), *losses[name]) for name, loss in absent.items()}
    losses |= found.points
    by_name = {block.name: block for block in survey.candidates}
    queries = {
        name: _scaled(by_name[name], found.curves[name], losses[name], own) for name, own in found.queries.items()
    }
    return replace(
        survey,
        curves=found.curves,
        losses=_of_nearest(survey, losses),
        query_losses=_of_nearest(survey, queries),
        stored=stored,
        outputs=passed.targets,
        rest=passed.rest,
    )


def _absent(survey: Survey, trials: Propagation, predicted: Mapping[str, Points], work: Workspace) -> dict[str, float]:
    """What the model loses without some of its blocks, by name: those that are missed least for what they cost.

    One after the other, each loss being what comes to that of those before: they are missed more together than alone,
    and a few of them ever more so. With what the consumers behind will mend.

    Args:
        survey: Of the model.
        trials: By which blocks are left out.
        predicted: Losses of all candidates, at width 0 among others, where errors of blocks are larger than those that
            they are predicted from: good for a first choice.
        work: Its clock runs.
    """
    offered = [block for block in survey.candidates if block.name in predicted and _may_be_left_out(survey, block)]

    def rate(block: Block, loss: float) -> float:
        return loss / (block.units * block.parameters_per_unit)

    with work.clock("propagation"):
        promising: list[Block] = []
        for kind in sorted({block.kind for block in offered}):
            alike = [block for block in offered if block.kind == kind]
            promising += sorted(alike, key=lambda block: rate(block, predicted[block.name][0][1]))[:_LEFT_OUT]
        alone = {block.name: trials.without([block]) for block in promising}
        promising = [block for block in promising if math.isfinite(alone[block.name])]
        promising.sort(key=lambda block: rate(block, alone[block.name]))
        losses: dict[str, float] = {}
        together = 0.0
        for count, block in enumerate(promising[:_LEFT_OUT], 1):
            before, together = together, trials.without(promising[:count]) if count > 1 else alone[block.name]
            if not math.isfinite(together):
                break
            losses[block.name] = _MENDED * max(together - before, alone[block.name])
    return losses


def _may_be_left_out(survey: Survey, block: Block) -> bool:
    """Whether nothing else must go with a block, and no bias stays that few runtimes would have a place for."""
    alone = block.removable and block.tie is None and block.stack is None
    return alone and getattr(survey.model.get_submodule(block.consumer), "bias", None) is None


def _looked_at(survey: Survey) -> set[str]:
    """Names of the blocks whose curves are made: of a family that gets one width, a few stand for all."""
    if not all(families.even for families in survey.families):
        return {block.name for block in survey.candidates}
    families = [family for one in survey.families for family in one.of(survey.candidates)]
    return {name for family in families for name in spread(family, STANDING_FOR_ALL, ends=False)}


def _of_nearest(survey: Survey, points: Mapping[str, Points]) -> dict[str, Points]:
    """Points of all blocks of families in which some have them: the others take those of the nearest one."""
    filled = dict(points)
    for family in (family for one in survey.families for family in one.of(survey.candidates)):
        known = [place for place, block in enumerate(family) if block.name in points]
        for place, block in enumerate(family if known else []):
            nearest = min(known, key=lambda other: abs(other - place))
            filled.setdefault(block.name, points[family[nearest].name])
    return filled


def _scaled(block: Block, curve: LossCurve, losses: Points, queries: Points) -> Points:
    """Losses of query heads in the unit of those of whole key/value heads, where as many columns are left."""
    errors = interpolate(curve.points, [width for width, _ in losses])
    ratios = [(width, loss / error) for (width, loss), error in zip(losses, errors, strict=True) if loss * error > 0]
    heads = len(block.queries.columns) / block.units  # type: ignore[union-attr]
    scaled = corrected(tuple((width / heads, error) for width, error in queries), tuple(ratios))
    return tuple((width, loss) for (width, _), (_, loss) in zip(queries, scaled, strict=True))


class _Pass:
    """The pass over the original model.

    Args:
        survey: Without losses.
        looked_at: Names of the blocks whose curves are made.
        trials: To prune some of them alone; `None` where no curve is made.
        stored: Gets the moments of all candidates, if they are to be kept.
        work: Its clock runs.

    Attributes:
        targets: What the candidates put out, where they will be asked for it and it could be kept.
        rest: Of the model's forwards on batches held out, where these came through.
    """

    def __init__(
        self,
        survey: Survey,
        looked_at: Collection[str],
        trials: Propagation | None,
        stored: dict[str, BlockMoments] | None,
        work: Workspace,
    ) -> None:
        self.survey, self.trials, self.stored, self.work = survey, trials, stored, work
        self.targets: Targets | None = None
        self.rest: Rest | None = None
        self._few = [block for block in survey.candidates if block.name in looked_at]
        self._groups = {block.name: group for group in groups_of(self._few) for block in group.blocks}
        self._everywhere = trials is not None and trials.evaluation is not None
        self._measured = set(self._groups) if self._everywhere else measured_blocks(self._few)
        self._waiting: dict[str, list[tuple[Problem, int]]] = {}

    def run(self) -> _Losses:
        """What is found, in every process."""
        found, walk = _Losses(), self._walk()
        for segment in steps(LOSSES, walk.left):
            with self.work.clock("calibration"):
                walk.start(segment)
            for block in segment.blocks:
                if self.stored is None and block.name not in self._groups:
                    continue
                with self.work.clock("calibration"):
                    moments = walk.moments([block])[block.name]
                if not is_mine(self.survey.owners[block.name]):
                    continue
                if self.stored is not None:
                    self.stored[block.name] = moments
                if self.trials is not None and block.name in self._groups:
                    found.update(self._with_group(block, moments))
                del moments
        self.targets, self.rest = walk.targets, walk.rest()
        for theirs in from_all(found):
            found.update(theirs)
        return found

    def _walk(self) -> SurveyWalk:
        survey, variant = self.survey, self.survey.configs[0].streams()
        kept = self.stored is None and variant in TWO_STREAMS and self.work.holds(_TARGET_BYTES)
        whole = self.stored is not None or kept or len(self._few) == len(survey.candidates)
        return SurveyWalk(
            survey.samples,
            survey.plan if whole else plan(survey.samples, self._few),
            survey.owners,
            looked_at=[block.name for block in (self._few if self.stored is None else survey.candidates)],
            fitted=None if self.stored is not None or self._everywhere else self._enough(),
            targets=Targets(Store()) if kept else None,
            variant=variant,
            most=_TARGET_BYTES,
        )

    def _enough(self) -> int:
        """Of how many of the batches to fit on curves are not those of fits to noise."""
        fit = self.survey.samples.fit
        consumers = (self.survey.model.get_submodule(block.consumer) for block in self._few)
        columns = max(matrix_shape(consumer)[0] for consumer in consumers)
        rows = max(_FEWEST_ROWS, _ROWS_A_COLUMN * columns)
        counts = range(FOLDS, len(fit), FOLDS)
        return next((count for count in counts if (tokens_in(fit[:count]) or 0) >= rows), len(fit))

    def _with_group(self, block: Block, moments: BlockMoments) -> _Losses:
        """What is found of a block, and of those that it is tied to, once the last of them is there."""
        group = self._groups[block.name]
        together = self._waiting.setdefault(group.blocks[0].name, [])
        together.append((self.survey.problem(block, moments, last=self.stored is None), moments.rows))
        if len(together) < len(group.blocks):
            return _Losses()
        del self._waiting[group.blocks[0].name]
        return _look_at(self.survey, group, together, self.trials if block.name in self._measured else None, self.work)


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
            found.factors.update(dict.fromkeys(names, trials.factors(blocks, curves)))
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
