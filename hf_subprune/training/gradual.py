"""Prune a model in steps between which it trains: masks at full size, surgery once at the end."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..allocation.choice import Widths, whole_heads
from ..allocation.surveying import looked_at_again, take_survey
from ..blocks import Block, some_of
from ..config import PruneConfig
from ..data.reading import read
from ..discovery.discover import called
from ..evaluation.drift import Drift, drift
from ..evaluation.outputs import model_outputs
from ..models.forms import apart
from ..models.precision import precise_products
from ..models.running import undisturbed
from ..report.records import BlockReport
from ..report.report import PruneReport
from ..runs.workspace import Workspace
from ..solving.loop import Solved, solve
from ..solving.outcome import outcome
from ..surgery.edits import kept_columns, shrink, undo_all
from ..surgery.masking import Mask, mask

logger = logging.get_logger(__name__)


class GradualPruning:
    """Removes units of a model step by step while somebody else trains it.

    The model's parameters stay the objects that they are until `finish`, so that an optimizer keeps hold of them.

    Args:
        model: At full size; masked in place by `step`.
        data: What each step fits on and measures drift on, as for `prune`.
        config: As for `prune`; the widths are those that it would choose for the model as it is now, or, where blocks
            have widths of their own by what they lose, as it is when it is first pruned. Grouped-query attention
            loses whole key/value heads only.
        processing_class: As for `prune`.
        progress: `state_dict()` of an earlier run of the same model and config, to go on from.

    Raises:
        ValueError: no block can be pruned, the data does not reach one, or `progress` is of other blocks.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        data: Any,
        config: PruneConfig,
        processing_class: Any = None,
        progress: Mapping[str, Any] | None = None,
    ) -> None:
        self.model, self.config = model, config
        with undisturbed(model):
            self.samples = read(model, data, config, processing_class)
        self._take_survey()
        self.kept = {b.name: torch.arange(b.units) for b in self.blocks}
        self.drift: dict[str, float] = {}
        self._solutions: dict[str, dict[str, Any]] = {}
        self._seconds = 0.0
        if progress is not None:
            self._load(progress)
        self._masks = self._make_masks()
        self.mask()

    def _take_survey(self) -> None:
        """Find the blocks, and the widths that they are to reach, of the model as it is now."""
        with self._alone():
            survey = take_survey(self.samples, [self.config], None, Workspace())
            self.blocks, self.targets = survey.blocks, whole_heads(survey, self.config)
        # Training makes moments and sensitivities out of date, and what was predicted of the model before it.
        self._survey = replace(survey.solved(), rest=None, curves={}, losses={}, query_losses={})

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """The model within as nothing else disturbs it, its experts apart, in the precision that all pruning is in."""
        with undisturbed(self.model), precise_products(self.model.parameters()), apart(self.model.modules()):
            yield

    @property
    def kept_fraction(self) -> float:
        """Fraction of the prunable blocks' parameters that is not masked."""
        kept = sum(len(self.kept[b.name]) * b.parameters_per_unit for b in self.blocks)
        return kept / sum(b.parameters for b in self.blocks)

    def mask(self) -> None:
        """Set the removed units' parameters to zero again, after something has changed parameters."""
        try:
            for one in self._masks:
                one.apply()
        except BaseException:  # an interrupt, which comes behind the last
            for one in self._masks:
                one.apply()
            raise

    def clear(self, state: Mapping[nn.Parameter, Mapping[str, Any]]) -> None:
        """Set the removed units' entries in the optimizer's statistics to zero."""
        for one in self._masks:
            one.clear(state)

    def step(self, removed: float) -> bool:
        """Mask further units and compute new weights for the consumers on the others.

        Args:
            removed: Fraction, in [0, 1], of the units to remove that are masked from now on. Never fewer than now.

        Returns:
            Whether a unit was masked; widths are whole numbers, so a small step may change none. If not, `drift`
            stays that of an earlier step.
        """
        start = time.perf_counter()
        if not self._solutions and self._follows_training():
            self._take_survey()
        widths = {b.name: self._width(b, removed) for b in self.blocks}
        shrinking = self._reached([b for b in self.blocks if widths[b.name] < len(self.kept[b.name])])
        if not shrinking:
            return False
        work, held_out = Workspace(), self.samples.own_held_out
        with self._alone(), work.undone_on_failure():
            reference = model_outputs(self.model, held_out)
            survey = replace(looked_at_again(self._survey), present=dict(self.kept))
            solved = solve(survey, Widths(self.config, shrinking, widths), work, install=mask)
            self.drift = drift(self.model, held_out, reference, shared=True).to_dict()
        self.kept.update({name: edit.kept for name, edit in solved.edits.items()})
        self._solutions.update({name: _solution(report) for name, report in solved.reports.items()})
        self._masks = self._make_masks()
        self._seconds += time.perf_counter() - start
        return True

    def _follows_training(self) -> bool:
        """Whether blocks have widths of their own by what they lose, which training changes."""
        return self.config.allocation() != "uniform" and not self._survey.families_of(self.config).even

    def _reached(self, blocks: Sequence[Block]) -> list[Block]:
        """Those of the blocks that the probe batch runs: a router may learn to send an expert none of its tokens."""
        with apart(self.model.modules()):
            readers = called(self.model, self._survey.probe)
        if silent := [b.name for b in blocks if b.consumer not in readers]:
            logger.warning(
                f"The probe batch, the first samples of the calibration data, no longer reaches {some_of(silent)}: "
                f"these blocks keep the units that they have."
            )
        return [b for b in blocks if b.consumer in readers]

    def finish(self) -> PruneReport:
        """Remove the masked units for good.

        Returns:
            Errors of blocks are those of the last step that changed them, and `drift` is that of the last step, each
            against the model as it was trained until then. No error is against the model before training.

        Raises:
            EquivalenceError: the shrunk model is not the masked model; it is left masked.
        """
        if any(len(self.kept[name]) > width for name, width in self.targets.items()):
            self.step(1.0)
        self.mask()
        pruned = [b for b in self.blocks if len(self.kept[b.name]) < b.units]
        start = time.perf_counter()
        work, solved = Workspace(), Solved(reports={b.name: self._report(b) for b in pruned})
        with self._alone(), work.undone_on_failure():
            work.undo.callback(undo_all, solved.edits)
            for block in pruned:
                solved.edits[block.name] = shrink(self.model, block, self.kept[block.name])
            widths = Widths(self.config, pruned, self.targets)
            drifted = Drift(**self.drift) if self.drift else None  # type: ignore[arg-type]
            report = outcome(self._survey, widths, solved, work, drifted)
        seconds = {"pruning steps": self._seconds, "surgery": time.perf_counter() - start}
        return replace(report, seconds=seconds)

    def state_dict(self) -> dict[str, Any]:
        """What has been done so far, as plain JSON types."""
        return {
            "targets": self.targets,
            "kept": {name: kept.tolist() for name, kept in self.kept.items()},
            "solutions": self._solutions,
            "drift": self.drift,
            "seconds": self._seconds,
        }

    def _load(self, progress: Mapping[str, Any]) -> None:
        units = {b.name: b.units for b in self.blocks}
        if set(progress["kept"]) != set(units):
            raise ValueError(
                f"The checkpoint was made while pruning {', '.join(progress['kept'])}; the config and the model now "
                f"give {', '.join(units)}. Go on with the model and the config of the run that made it."
            )
        self.targets = dict(progress["targets"])
        self.kept = {name: torch.tensor(kept) for name, kept in progress["kept"].items()}
        self._solutions, self.drift = dict(progress["solutions"]), dict(progress["drift"])
        self._seconds = progress["seconds"]

    def _make_masks(self) -> list[Mask]:
        with apart(self.model.modules()):  # an expert's mask writes into the tensors that it is a part of
            return [Mask(self.model, b, self.kept[b.name]) for b in self.blocks if len(self.kept[b.name]) < b.units]

    def _width(self, block: Block, removed: float) -> int:
        target = self.targets[block.name]
        return target + round((block.units - target) * (1 - removed))

    def _report(self, block: Block) -> BlockReport:
        kept = self.kept[block.name]
        return BlockReport(
            name=block.name,
            kind=block.kind,
            stack=block.stack,
            consumer=block.consumer,
            units_before=block.units,
            units_after=len(kept),
            kept_units=tuple(kept.tolist()),
            kept_columns=tuple(kept_columns(block, kept).tolist()),
            **self._solutions[block.name],
        )


def _solution(report: BlockReport) -> dict[str, Any]:
    """What a step says of a block, as plain JSON types, besides the units that it keeps."""
    return {
        "fitted_error": report.fitted_error,
        "held_out_error": report.held_out_error,
        "shrinkage": report.shrinkage,
        "method": f"gradual, {report.method}",
        "guarantee": None,  # steps together are no choice that one bound speaks of
        "seconds": report.seconds,
    }
