"""What errors of blocks do to the model's output, measured by pruning some of them alone."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

from transformers import PreTrainedModel

from ..blocks import Block, groups_of
from ..collection.block_moments import FOLDS
from ..data.batches import Samples
from ..evaluation.drift import Drift, Outputs, drift, iter_outputs
from ..models.running import Batch
from ..solver.curves import LossCurve, Trial
from ..surgery.edits import shrink

Points = tuple[tuple[int, float], ...]
"""`(width, loss)`, ascending, the full width with loss 0 last."""

TRIAL_FRACTIONS = (0.15, 0.35)
"""Of a block's units: widths at which it is pruned alone, to see what its error does to the model's output."""

# Blocks of one kind that are pruned alone, at equal distances over the depth, and rows of the output that they are
# measured on: the cost must not grow with the square of the depth.
_MEASURED_BLOCKS = 12
_MEASURED_ROWS = 512


class Quality:
    """What a caller's function says of models, which must be a number.

    Args:
        evaluation: Given a model, its quality; more is better.
        model: The original.

    Attributes:
        original: Its quality.

    Raises:
        ValueError: now or later, the quality is NaN or infinite.
    """

    def __init__(self, evaluation: Callable[[PreTrainedModel], float], model: PreTrainedModel):
        self._evaluation = evaluation
        self.original = self(model)

    def __call__(self, model: PreTrainedModel) -> float:
        value = float(self._evaluation(model))
        if not math.isfinite(value):
            raise ValueError(
                f"`evaluation` returned {value} for {type(model).__name__}, of which no loss can be told: let it "
                "return a finite number, more for better."
            )
        return value


class Propagation:
    """What a block's error does to the model's output, measured by pruning the block alone, or with its tie.

    The metric that weighs errors (`collection.sensitivity`) is a linearisation at the original model; early blocks
    exceed it, since what they do wrong goes through all others. The factor between measured and predicted drift
    corrects a block's whole curve.

    Args:
        samples: Of the original; batches of all but the first fold are run, the trials having been fitted on that.
        evaluation: Measured in place of the drift on `samples`.
    """

    def __init__(self, samples: Samples, evaluation: Quality | None = None):
        model = self.model = samples.model
        self.evaluation = evaluation
        self.batches: list[Batch] = []
        self._reference: list[Outputs] = []
        if evaluation is not None:
            return
        unseen = [batch for index, batch in enumerate(samples.fit) if index % FOLDS]
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
                return max(0.0, self.evaluation.original - self.evaluation(self.model))
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
        groups = groups_of(b for b in blocks if b.kind == kind)
        count = min(len(groups), _MEASURED_BLOCKS)
        for i in range(count):
            chosen |= {b.name for b in groups[round(i * (len(groups) - 1) / max(count - 1, 1))].blocks}
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
