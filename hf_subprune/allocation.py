"""From what was asked for and what blocks lose to the width of every block."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

from transformers import PreTrainedModel

from .blocks import Block, by_width
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
from .calibration import Batch, CalibrationSet
from .config import PruneConfig
from .curves import LossCurve, Trial
from .evaluation import Drift, Outputs, drift, iter_outputs
from .surgery import shrink
from .taps import FOLDS
from .targets import Part, Target

Points = tuple[tuple[int, float], ...]
"""`(width, loss)`, ascending, the full width with loss 0 last."""

TRIAL_FRACTIONS = (0.15, 0.35)
"""Of a block's units: widths at which it is pruned alone, to see what its error does to the model's output."""

# Blocks of one kind that are pruned alone, at equal distances over the depth, and rows of the output that they are
# measured on: the cost must not grow with the square of the depth.
_MEASURED_BLOCKS = 12
_MEASURED_ROWS = 512

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


class Propagation:
    """What a block's error does to the model's output, measured by pruning the block alone, or with its tie.

    The metric of section 4 is a linearisation at the original model; early blocks exceed it, since what they do wrong
    goes through all others. The factor between measured and predicted drift corrects a block's whole curve.

    Args:
        model: The original.
        calibration: Batches of all but the first fold are run, the trials having been fitted on the first.
        evaluation: Quality of a model, more is better; measured in place of the drift on `calibration`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        calibration: CalibrationSet,
        evaluation: Callable[[PreTrainedModel], float] | None = None,
    ):
        self.model, self.evaluation = model, evaluation
        self.batches: list[Batch] = []
        self._reference: list[Outputs] = []
        if evaluation is not None:
            self._quality = float(evaluation(model))
            return
        unseen = [batch for index, batch in enumerate(calibration.fit) if index % FOLDS]
        order = sorted(range(len(unseen)), key=lambda i: abs(i - len(unseen) // 2))  # of middling length first
        unseen = [unseen[index] for index in order]
        for batch, outputs in zip(unseen, iter_outputs(model, unseen), strict=True):
            self.batches.append(batch)
            self._reference.append(outputs)
            if sum(len(one.rows) for one in self._reference) >= _MEASURED_ROWS:
                break
        self._per_sample = has_row_per_sample(self._reference, self.batches)

    def measure(self, blocks: Sequence[Block], trials: Sequence[Trial]) -> float:
        """Drift of the model's output, or loss of quality, with one block pruned, or the blocks of one tie."""
        with ExitStack() as undo:
            for block, trial in zip(blocks, trials, strict=True):
                bias = getattr(self.model.get_submodule(block.consumer), "bias", None)
                bias = None if bias is None else bias.detach() + trial.bias_shift.to(bias)
                undo.callback(shrink(self.model, block, trial.kept, weight=trial.V, bias=bias).undo)
            if self.evaluation is not None:
                return max(0.0, self._quality - float(self.evaluation(self.model)))
            return scalar_drift(drift(self.model, self.batches, self._reference), self._per_sample)

    def factor(self, blocks: Sequence[Block], curves: Sequence[LossCurve]) -> float:
        """Measured over predicted drift, the geometric mean over the trials; NaN where either is zero."""
        trials = [[curve.trials[width] for curve in curves] for width in curves[0].trials]
        pairs = [(self.measure(blocks, same), sum(trial.error for trial in same)) for same in trials]
        if not pairs or not all(0 < x < math.inf for pair in pairs for x in pair):
            return math.nan
        return math.exp(sum(math.log(measured / predicted) for measured, predicted in pairs) / len(pairs))

    def points(self, blocks: Sequence[Block], curves: Sequence[LossCurve]) -> Points:
        """The measured loss itself at the widths of the trials, in equal parts for the blocks of a tie."""
        trials = {width: [curve.trials[width] for curve in curves] for width in sorted(curves[0].trials)}
        losses = ((width, self.measure(blocks, same) / len(blocks)) for width, same in trials.items())
        return (*losses, (blocks[0].units, 0.0))


def scalar_drift(change: Drift, per_sample: bool) -> float:
    """The one figure that budgets predict: divergence for logits, squared relative error for hidden states.

    Squared relative error, too, for logits of one row per sample: the divergence of a few rows of a classifier that is
    sure of them is that of the one row that changed sides.
    """
    return change.relative_error**2 if change.kl is None or per_sample else change.kl


def has_row_per_sample(outputs: Sequence[Outputs], batches: Sequence[Batch]) -> bool:
    """Whether the model says one thing about each sample, as a classifier does."""
    return sum(len(o.rows) for o in outputs) == sum(len(next(iter(batch.values()))) for batch in batches)


def measured_blocks(blocks: Sequence[Block]) -> set[str]:
    """Names of the blocks to prune alone (or with their tie or stack): of each kind a dozen, at equal distances."""
    chosen: set[str] = set()
    for kind in {b.kind for b in blocks}:
        ties = by_width(b for b in blocks if b.kind == kind)
        count = min(len(ties), _MEASURED_BLOCKS)
        for i in range(count):
            chosen |= {b.name for b in ties[round(i * (len(ties) - 1) / max(count - 1, 1))]}
    return chosen


def fill_in(blocks: Sequence[Block], factors: Mapping[str, float]) -> dict[str, float]:
    """Factors for all blocks: those not measured, or without a figure, take that of the nearest one of their kind."""
    filled: dict[str, float] = {}
    for kind in {b.kind for b in blocks}:
        names = [b.name for b in blocks if b.kind == kind]
        known = [i for i, name in enumerate(names) if math.isfinite(factors.get(name, math.nan))]
        for i, name in enumerate(names):
            nearest = min(known, key=lambda j: abs(i - j), default=None)
            filled[name] = 1.0 if nearest is None else factors[names[nearest]]
    return filled
