"""Do predicted losses rank allocations as the model's drift does, and does `global` beat `uniform`?"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from rich.table import Table
from scipy.stats import spearmanr
from transformers import PreTrainedModel

from ..allocation.budgets import interpolate
from ..allocation.families import Families
from ..allocation.propagation import has_row_per_sample, scalar_drift
from ..allocation.survey import Survey
from ..allocation.surveying import take_survey
from ..allocation.targets import keep_target
from ..allocation.widths import choose_widths
from ..blocks import Block
from ..config import PruneConfig
from ..data.reading import read
from ..evaluation.drift import drift
from ..evaluation.outputs import model_outputs
from ..models.forms import apart
from ..models.linears import weight_matrix
from ..models.running import evaluating
from ..runs.workspace import Workspace
from ..solver.moments import combine
from ..solver.problem import columns_of
from ..solver.reweighting import Reweighted, reweight
from ..solver.settings import PRIOR_SHRINKAGE
from ..surgery.edits import shrink

# Fractions of a block's units that random allocations choose from.
_GRID = (0.08, 0.15, 0.25, 0.35, 0.5, 0.65, 0.8, 1.0)
_TOLERANCE = 0.01


def bench_budgets(
    model: PreTrainedModel,
    data: Any,
    config: PruneConfig,
    processing_class: Any = None,
    *,
    keeps: Sequence[float] = (0.7, 0.5, 0.35),
    allocations: int = 40,
    advanced: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """Held-out drift of each budget at each size, and of random allocations, beside the drift predicted.

    Every block is on its greedy path with a shrinkage of 0.1, whatever the budget: only widths differ.

    Args:
        model: Unchanged on return.
        data: As for `prune`.
        config: Says what to calibrate on, `held_out` to measure the drift on, and the seed of the random allocations.
            Variant, sizes and layout are those of this comparison.
        processing_class: As for `prune`.
        keeps: Fractions of the prunable parameters.
        allocations: Number of random ones, in turn at a size of `keeps` and at any size between the extremes of them.
        advanced: Called after each row.

    Returns:
        Rows of `budget` (`"random"` among them), `keep` (asked for), `kept` (reached), `predicted` and `actual` drift:
        as `allocation.propagation.scalar_drift` counts it; `figures`, the drift in full.
    """
    base = replace(config, variant="layer", keep=min(keeps), layout="ragged", round_to=1)
    with evaluating(model), apart(model.modules()):
        survey = take_survey(read(model, data, base, processing_class), [base], None, Workspace())
        drifts = _Drifts(survey)
        rows = []
        for keep in keeps:
            for budget in ("uniform", "equal_loss", "global"):
                wanted = replace(base, keep=keep, budget=budget)
                target = keep_target(survey.blocks, wanted)
                families = Families.single(survey.blocks)
                widths = choose_widths(survey.blocks, target, wanted, families, survey.losses)
                rows.append({"budget": budget, "keep": keep, **drifts.row(widths)})
                advanced()
        rng = random.Random(config.seed)
        for index in range(allocations):
            keep = rng.choice(list(keeps)) if index % 2 else rng.uniform(min(keeps), max(keeps))
            rows.append({"budget": "random", "keep": keep, **drifts.row(_random_widths(survey.blocks, keep, rng))})
            advanced()
    return rows


def rank_correlation(rows: Sequence[Mapping[str, Any]]) -> float:
    """Spearman's, of predicted and actual drift over the random allocations."""
    chosen = [row for row in rows if row["budget"] == "random"]
    return float(spearmanr([r["predicted"] for r in chosen], [r["actual"] for r in chosen]).statistic)


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Budgets side by side, the rank correlation below, as a rich table."""
    shown = Table(title="Held-out drift by budget", title_justify="left")
    embeds = all("embedding_cosine" in row["figures"] for row in rows)
    for name in ("keep", "budget", "kept", "predicted", "actual", "against uniform"):
        shown.add_column(name, justify="left" if name == "budget" else "right")
    if embeds:
        shown.add_column("1 - cosine of embeddings", justify="right")
        shown.add_column("against uniform", justify="right")
    uniform = {row["keep"]: row for row in rows if row["budget"] == "uniform"}
    for row in rows:
        if row["budget"] != "random":
            same = uniform[row["keep"]]
            figures = [f"{row['kept']:.3f}", f"{row['predicted']:.4g}", *_against(same["actual"], row["actual"])]
            if embeds:
                figures += _against(_turned(same), _turned(row))
            shown.add_row(f"{row['keep']:g}", row["budget"], *figures)
    count = sum(row["budget"] == "random" for row in rows)
    if count:
        shown.caption = (
            f"Rank correlation of predicted and actual drift over {count} random allocations: "
            f"{rank_correlation(rows):.3f}."
        )
        shown.caption_justify = "left"
    return shown


def _against(uniform: float, value: float) -> list[str]:
    return [f"{value:.4g}", f"{value / uniform - 1:+.0%}"]


def _turned(row: Mapping[str, Any]) -> float:
    return 1 - row["figures"]["embedding_cosine"]


class _Drifts:
    """Prunes a surveyed model to any widths and measures what comes out."""

    def __init__(self, survey: Survey):
        self.survey = survey
        if survey.stored is None:
            raise ValueError("The moments of this model do not fit into memory: bench a smaller one.")
        self._stored = survey.stored
        self._reference = model_outputs(survey.model, survey.samples.held_out)
        self._per_sample = has_row_per_sample(self._reference, survey.samples.held_out)
        self._fits: dict[tuple[str, int], Reweighted] = {}

    def row(self, widths: Mapping[str, int]) -> dict[str, Any]:
        model, samples = self.survey.model, self.survey.samples
        edits = []
        try:
            for block in self.survey.blocks:
                if widths[block.name] < block.units:
                    edits.append(self._shrink(block, widths[block.name]))
            change = drift(model, samples.held_out, self._reference)
        finally:
            for edit in reversed(edits):
                edit.undo()
        blocks = self.survey.blocks
        kept = sum(widths[b.name] * b.parameters_per_unit for b in blocks) / sum(b.parameters for b in blocks)
        losses = self.survey.losses
        predicted = sum(interpolate(losses[b.name], [widths[b.name]])[0] for b in blocks)
        return {
            "kept": kept,
            "predicted": predicted,
            "actual": scalar_drift(change, self._per_sample),
            "figures": change.to_dict(),
        }

    def _shrink(self, block: Block, width: int):
        consumer: Any = self.survey.model.get_submodule(block.consumer)
        kept = self.survey.curves[block.name].order[:width].sort().values
        if (block.name, width) not in self._fits:
            W = weight_matrix(consumer)
            total = combine(self._stored[block.name].of_folds(W))
            columns = columns_of(kept, block.columns)
            self._fits[block.name, width] = reweight(total, W, columns, PRIOR_SHRINKAGE)
        fit = self._fits[block.name, width]
        bias = None if consumer.bias is None else consumer.bias.detach() + fit.bias_shift.to(consumer.bias)
        return shrink(self.survey.model, block, kept, weight=fit.V, bias=bias)


def _random_widths(blocks: Sequence[Block], keep: float, rng: random.Random) -> dict[str, int]:
    """A fraction of the grid for each block, drawn until the whole comes near `keep`."""
    total = sum(b.parameters for b in blocks)
    fractions = {b.name: rng.choice(_GRID) for b in blocks}
    while True:
        widths = {b.name: max(1, int(fractions[b.name] * b.units)) for b in blocks}
        kept = sum(widths[b.name] * b.parameters_per_unit for b in blocks) / total
        if abs(kept - keep) < _TOLERANCE:
            return widths
        block = rng.choice(list(blocks))  # redrawn on the side that is needed
        at = _GRID.index(fractions[block.name])
        choices = _GRID[: at + 1] if kept > keep else _GRID[at:]
        fractions[block.name] = rng.choice(choices)
