"""What errors of blocks do to the model's output, measured by pruning some of them alone."""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, TypeVar

import numpy as np
import torch
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from ..blocks import Block, groups_of, place_of
from ..collection.block_moments import FOLDS
from ..collection.segments import Segment
from ..data.batches import Samples, brief, pieces, tokens_in
from ..evaluation.drift import Drift, drift
from ..evaluation.outputs import Outputs, model_outputs
from ..models.running import Batch, copied, encoder_of, hooked, said_again
from ..solver.curves import LossCurve, Trial
from ..surgery.edits import shrink

_W = TypeVar("_W", int, float)

Points = tuple[tuple[int, float], ...]
"""`(width, loss)`, ascending, the full width with loss 0 last; width 0 only where it is known what is lost there."""

TRIAL_FRACTIONS = (0.35, 0.7)
"""Of a block's units: widths at which it is pruned alone, to see what its error does to the model's output."""

# Blocks of one kind that are pruned alone, at equal distances over the depth, and rows of the output that they are
# measured on, or tokens where there is one row a sample: the cost must not grow with the square of the depth.
_MEASURED_BLOCKS = 12
_MEASURED_ROWS = 256
_MEASURED_TOKENS = 2048
# Samples of what a decoder writes down that they are measured on: an encoder hears, or sees, far more than it writes.
_MEASURED_SOUNDS = 4
# Bytes of segments' outputs that are kept to be read again; beyond that, what lies before a block runs every time.
_KNOWN_BYTES = 100 * 2**20


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
    exceed it, since what they do wrong goes through all others. The factors between measured and predicted drift, at
    two widths, correct a block's whole curve. What lies before a block runs once for all trials: segments before its
    own, and of an encoder and a decoder, the encoder for the decoder's blocks.

    Args:
        samples: Of the original; batches of all but the first fold are run, the trials having been fitted on that.
        segments: Parts of the model that can be run one at a time, in forward order.
        evaluation: Measured in place of the drift on `samples`.
    """

    def __init__(self, samples: Samples, segments: Sequence[Segment] = (), evaluation: Quality | None = None):
        model = self.model = samples.model
        self.segments, self.evaluation = segments, evaluation
        self.batches: list[Batch] = []
        self._reference: list[Outputs] = []
        self._encoder: str | None = None
        self._known: dict[str, list[Any]] = {}  # outputs by module, batch by batch
        if evaluation is not None:
            return
        self._encoder = encoder_of(model)
        paths = [segment.path for segment in segments if segment.path]
        self._known = {path: [] for path in (*paths, *([self._encoder] if self._encoder else []))}
        unseen = [one for index, batch in enumerate(samples.fit) if index % FOLDS for one in _few_tokens(batch)]
        order = sorted(range(len(unseen)), key=lambda i: abs(i - len(unseen) // 2))  # of middling length first
        unseen = [unseen[index] for index in order]
        for batch in unseen:
            self.batches.append(batch)
            with hooked(model, outputs=[(path, self._note(path)) for path in self._known]):
                self._reference += model_outputs(model, [batch])
            self._let_go_of_too_much()
            rows = sum(len(one.rows) for one in self._reference)
            if rows >= _MEASURED_ROWS or (tokens_in(self.batches) or 0) >= _MEASURED_TOKENS or _is_written_down(batch):
                break
        self._per_sample = has_row_per_sample(self._reference, self.batches)

    def measure(self, blocks: Sequence[Block], trials: Sequence[Trial]) -> float:
        """Drift of the model's output, or loss of quality, with one block pruned, or the blocks of one tie."""
        with ExitStack() as undo:
            for block, trial in zip(blocks, trials, strict=True):
                bias = getattr(self.model.get_submodule(block.consumer), "bias", None)
                bias = None if bias is None else bias.detach() + trial.bias_shift.to(bias)
                undo.callback(shrink(self.model, block, trial.kept, weight=trial.V, bias=bias).undo)
            return self._lost(blocks)

    def without(self, blocks: Sequence[Block]) -> float:
        """As `measure`, with blocks that keep no unit."""
        with ExitStack() as undo:
            for block in blocks:
                undo.callback(shrink(self.model, block, ()).undo)
            return self._lost(blocks)

    def _lost(self, blocks: Sequence[Block]) -> float:
        """Of the model as it is, in which blocks were changed."""
        if self.evaluation is not None:
            return max(0.0, self.evaluation.original - self.evaluation(self.model))
        with ExitStack() as undo:
            for path in self._before(blocks):
                undo.enter_context(said_again(self.model.get_submodule(path), iter(self._known[path]).__next__))
            return scalar_drift(drift(self.model, self.batches, self._reference), self._per_sample)

    def _note(self, path: str) -> Callable[[Any], None]:
        return lambda output: self._known[path].append(copied(output)) if path in self._known else None

    def _let_go_of_too_much(self) -> None:
        """Of the segments, where their outputs take too much memory."""
        leaves = tree_leaves([outputs for path, outputs in self._known.items() if path != self._encoder])
        if sum(leaf.numel() * leaf.element_size() for leaf in leaves if isinstance(leaf, torch.Tensor)) > _KNOWN_BYTES:
            self._known = {path: outputs for path, outputs in self._known.items() if path == self._encoder}

    def _before(self, blocks: Sequence[Block]) -> list[str]:
        """Paths of what puts out the same whatever becomes of the blocks, the outermost of it."""
        holding = [any(block in segment.blocks for block in blocks) for segment in self.segments]
        before = [s.path for s in self.segments[: holding.index(True)]] if any(holding) else []
        if self._encoder is not None and not any(b.consumer.startswith(f"{self._encoder}.") for b in blocks):
            before = [self._encoder, *(path for path in before if not path.startswith(f"{self._encoder}."))]
        return [path for path in before if path in self._known]

    def factors(self, blocks: Sequence[Block], curves: Sequence[LossCurve]) -> Points:
        """Measured over predicted drift, by the width of each trial; without those at which either is zero."""
        trials = {width: [curve.trials[width] for curve in curves] for width in sorted(curves[0].trials)}
        measured = ((w, self.measure(blocks, same), sum(trial.error for trial in same)) for w, same in trials.items())
        return tuple(
            (w, drift / error) for w, drift, error in measured if all(0 < x < math.inf for x in (drift, error))
        )

    def points(self, blocks: Sequence[Block], curves: Sequence[LossCurve]) -> Points:
        """The measured loss itself at the widths of the trials, in equal parts for the blocks of a tie."""
        trials = {width: [curve.trials[width] for curve in curves] for width in sorted(curves[0].trials)}
        losses = ((width, self.measure(blocks, same) / len(blocks)) for width, same in trials.items())
        return (*losses, (blocks[0].units, 0.0))


def _is_written_down(batch: Batch) -> bool:
    """Whether a decoder reads tokens, and an encoder something else."""
    return "decoder_input_ids" in batch and "input_ids" not in batch


def _few_tokens(batch: Batch) -> list[Batch]:
    """The batch in batches of about as many tokens as are measured on, or of so many samples without tokens."""
    if "input_ids" not in batch:
        return pieces(batch, _MEASURED_SOUNDS if _is_written_down(batch) else _MEASURED_ROWS)
    tokens = batch["input_ids"].shape[-1]
    return [brief(one, _MEASURED_ROWS) for one in pieces(batch, max(1, _MEASURED_ROWS // tokens))]


def scalar_drift(change: Drift, per_sample: bool) -> float:
    """The one figure that budgets predict: divergence for logits, squared relative error for hidden states.

    Squared relative error, too, for logits of one row per sample: the divergence of a few rows of a classifier that is
    sure of them is that of the one row that changed sides.
    """
    return change.relative_error**2 if change.kl is None or per_sample else change.kl


def has_row_per_sample(outputs: Sequence[Outputs], batches: Sequence[Batch]) -> bool:
    """Whether the model says one thing about each sample, as a classifier does."""
    return sum(len(o.rows) for o in outputs) == sum(len(next(iter(batch.values()))) for batch in batches)


def spread(blocks: Sequence[Block], count: int, *, ends: bool = True) -> set[str]:
    """Names of `count` of the blocks at equal distances, and of those that are decided on together with them.

    Args:
        blocks: In forward order.
        count: Of blocks, or of groups of them.
        ends: Whether the first and the last are among them. Else each is in the middle of its part of the depth, and
            typical of it: the first layers of a model and its last one are like no others.
    """
    groups = groups_of(blocks)
    count = min(len(groups), count)
    if ends:
        places = {round(i * (len(groups) - 1) / max(count - 1, 1)) for i in range(count)}
    else:
        places = {int((i + 0.5) * len(groups) / count) for i in range(count)}
    return {block.name for place in places for block in groups[place].blocks}


def measured_blocks(blocks: Sequence[Block]) -> set[str]:
    """Names of the blocks to prune alone (or with their tie or stack): of each kind a dozen, at equal distances."""
    kinds = {b.kind for b in blocks}
    return {name for kind in kinds for name in spread([b for b in blocks if b.kind == kind], _MEASURED_BLOCKS)}


def fill_in(blocks: Sequence[Block], factors: Mapping[str, Points]) -> dict[str, Points]:
    """Factors for all blocks, by name: means of those at the same place of layers around, the nearer the more.

    Those of one block come from the drift on a few hundred tokens; what they have in common with those of its
    neighbours is less of an accident. Where there are none at its place, a block takes those of the nearest one of its
    kind.

    Args:
        blocks: In forward order.
        factors: Of the blocks that were measured; those without a figure have none.
    """
    filled: dict[str, Points] = {}
    for kind in {b.kind for b in blocks}:
        alike = [b for b in blocks if b.kind == kind]
        known = {position: factors[b.name] for position, b in enumerate(alike) if factors.get(b.name)}
        layers: dict[Any, dict[int, Points]] = defaultdict(dict)
        for position, points in known.items():
            layers[place_of(alike[position])][position] = points
        for position, block in enumerate(alike):
            filled[block.name] = _around(position, layers.get(place_of(block), known))
    return filled


def _around(position: int, factors: Mapping[int, Points]) -> Points:
    """Means of factors by their position, of the logarithms; those of the nearest where others are of other widths."""
    nearest = min(factors, key=lambda other: abs(other - position), default=None)
    if nearest is None:
        return ()
    widths = [width for width, _ in factors[nearest]]
    alike = [other for other, points in factors.items() if [width for width, _ in points] == widths]
    reach = 2 * (max(alike) - min(alike)) / max(1, len(alike) - 1)  # to the second of those at equal distances
    weights = [max(0.0, reach - abs(other - position)) for other in alike]
    if not any(weights):
        return factors[nearest]
    logarithms = np.log([[factor for _, factor in factors[other]] for other in alike])
    means = np.exp(np.average(logarithms, axis=0, weights=weights))
    return tuple(zip(widths, map(float, means), strict=True))


def corrected(
    points: Sequence[tuple[_W, float]], factors: Sequence[tuple[float, float]]
) -> tuple[tuple[_W, float], ...]:
    """Predicted losses times what was measured over what was predicted, in equal parts between measured widths."""
    if not factors:
        return tuple(points)
    widths, logarithms = [width for width, _ in factors], [math.log(factor) for _, factor in factors]
    return tuple((w, loss * math.exp(np.interp(w, widths, logarithms))) for w, loss in points)
