"""Prune a model in steps between which it trains: masks at full size, surgery once at the end."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import torch
from accelerate.utils import broadcast
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..allocation.survey import Calibrated
from ..blocks import Block, by_tie, some_of
from ..collection.block_moments import BlockMoments
from ..collection.planning import plan
from ..collection.walk import collect
from ..config import PruneConfig
from ..data.reading import read
from ..discovery.discover import called
from ..evaluation.costs import circumstances, count
from ..evaluation.drift import drift, model_outputs
from ..models.forms import apart, put_together
from ..models.linears import weight_matrix
from ..models.running import undisturbed
from ..report.records import BlockReport, Change
from ..report.report import PruneReport
from ..runs.memory import peak_memory
from ..solver.moments import restrict
from ..solver.problem import Problem
from ..solver.settings import Settings
from ..solver.solve import Choice, solve
from ..solver.tied import choose_together
from ..storage.layout import choose_layout
from ..surgery.edits import Edit, kept_columns, shrink, taken_back, undo_all
from ..surgery.masking import Mask, MaskEdit
from ..surgery.verification import verify

logger = logging.get_logger(__name__)


class GradualPruning:
    """Removes units of a model step by step while somebody else trains it.

    The model's parameters stay the objects that they are until `finish`, so that an optimizer keeps hold of them.

    Args:
        model: At full size; masked in place by `step`.
        data: What each step fits on and measures drift on, as for `prune`.
        config: As for `prune`; the widths are those that it would choose for the model as it is when it is first
            pruned. Grouped-query attention loses whole key/value heads only.
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
            self.calibration = read(model, data, config, processing_class)
        self._calibrate()
        self.kept = {b.name: torch.arange(b.units) for b in self.blocks}
        self.drift: dict[str, float] = {}
        self._solutions: dict[str, dict[str, Any]] = {}
        self._seconds = 0.0
        if progress is not None:
            self._load(progress)
        self._masks = self._make_masks()
        self.mask()

    def _calibrate(self) -> None:
        """Find the blocks, and the widths that they are to reach, of the model as it is now."""
        with undisturbed(self.model), apart(self.model):
            self._calibrated = Calibrated(self.model, self.calibration, [self.config])
            self._calibrated.stored = None  # training makes these moments out of date
            self.blocks, self.targets = self._calibrated.blocks, self._calibrated.widths(self.config)

    @property
    def kept_fraction(self) -> float:
        """Fraction of the prunable blocks' parameters that is not masked."""
        kept = sum(len(self.kept[b.name]) * b.parameters_per_unit for b in self.blocks)
        return kept / sum(b.parameters for b in self.blocks)

    def mask(self) -> None:
        """Set the removed units' parameters to zero again, after something has changed parameters."""
        for mask in self._masks:
            mask.apply()

    def clear(self, state: Mapping[nn.Parameter, Mapping[str, Any]]) -> None:
        """Set the removed units' entries in the optimizer's statistics to zero."""
        for mask in self._masks:
            mask.clear(state)

    def step(self, removed: float) -> bool:
        """Mask further units and compute new weights for the consumers on the others.

        Args:
            removed: Fraction, in [0, 1], of the units to remove that are masked from now on. Never fewer than now.

        Returns:
            Whether a unit was masked; widths are whole numbers, so a small step may change none. If not, `drift`
            stays that of an earlier step.
        """
        start = time.perf_counter()
        if not self._solutions and self.config.allocation() != "uniform":  # it has trained since it was calibrated
            self._calibrate()
        widths = {b.name: self._width(b, removed) for b in self.blocks}
        shrinking = self._reached([b for b in self.blocks if widths[b.name] < len(self.kept[b.name])])
        if not shrinking:
            return False
        edits: dict[str, MaskEdit] = {}
        solutions: dict[str, dict[str, Any]] = {}
        with undisturbed(self.model), apart(self.model), ExitStack() as on_failure:
            on_failure.callback(undo_all, edits)
            reference = model_outputs(self.model, self.calibration.held_out)
            self._calibrated.look_again()
            for tie in by_tie(b for b in shrinking if b.tie):
                with taken_back(edits):
                    moments = list(self._moments(tie, "layer", {}))
                width = widths[tie[0].name]
                chosen = choose_together([self._problem(*pair) for pair in moments], width, Settings.of(self.config))
                for block, own in moments:
                    edits[block.name], solutions[block.name] = self._prune(block, own, width, chosen)
            alone = [b for b in shrinking if b.tie is None]
            with taken_back(edits) if self.config.streams() == "layer" else nullcontext():
                for block, own in self._moments(alone, self.config.streams(), edits):
                    edits[block.name], solutions[block.name] = self._prune(block, own, widths[block.name])
            change = drift(self.model, self.calibration.held_out, reference)
            on_failure.pop_all()
        self.kept.update({name: edit.kept for name, edit in edits.items()})
        self._solutions.update(solutions)
        self.drift = change.to_dict()
        self._masks = self._make_masks()
        self._seconds += time.perf_counter() - start
        return True

    def _reached(self, blocks: Sequence[Block]) -> list[Block]:
        """Those of the blocks that the probe batch runs: a router may learn to send an expert none of its tokens."""
        with apart(self.model):
            readers = called(self.model, self._calibrated.probe)
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
        with undisturbed(self.model), apart(self.model), ExitStack() as on_failure:
            verify(self.model, pruned, self.kept, self._calibrated.probe)
            edits: dict[str, Edit] = {}
            on_failure.callback(undo_all, edits)
            for block in pruned:
                edits[block.name] = shrink(self.model, block, self.kept[block.name])
            latency = self._calibrated.latency(edits)  # the masked model takes as long as the original
            on_failure.callback(put_together(self.model.modules()))
            layout = choose_layout(self.model, self.config.layout, inputs=self._calibrated.probe)
            on_failure.callback(layout.undo)
            after = count(self.model, self.calibration.held_out[0])
            on_failure.pop_all()
        before = self._calibrated.before
        reached = self._calibrated.reached(self.config, pruned, self.targets, latency)
        allocation = self._calibrated.allocation(self.config, self.blocks, self.targets, reached)
        return PruneReport(
            model=getattr(self.model, "name_or_path", "") or "",
            architecture=type(self.model).__name__,
            config=self.config.to_dict(),
            blocks=tuple(map(self._report, self.blocks)),
            refusals=self._calibrated.found.refusals,
            layout=layout.kind,
            layout_reason=layout.reason,
            parameters=Change(before.parameters, after.parameters),
            macs=Change(before.macs, after.macs),
            latency=latency,
            measured_on=circumstances(self.model, self.calibration.held_out[0]),
            drift=self.drift,
            data=self.calibration.description,
            seconds={"pruning steps": self._seconds, "surgery": time.perf_counter() - start},
            peak_memory=peak_memory(),
            versions={name: version(name) for name in ("hf_subprune", "torch", "transformers")},
            allocation=replace(allocation, predicted_drift=None),  # it was predicted for the model before training
        )

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
        with apart(self.model):  # an expert's mask writes into the tensors that it is a part of
            return [Mask(self.model, b, self.kept[b.name]) for b in self.blocks if len(self.kept[b.name]) < b.units]

    def _width(self, block: Block, removed: float) -> int:
        target = self.targets[block.name]
        return target + round((block.units - target) * (1 - removed))

    def _moments(
        self, blocks: Sequence[Block], variant: str, edits: Mapping[str, MaskEdit]
    ) -> Iterator[tuple[Block, BlockMoments]]:
        return collect(self.model, plan(self.model, blocks, self._calibrated.probe), self.calibration, variant, edits)

    def _problem(self, block: Block, moments: BlockMoments) -> Problem:
        """What there is to choose from: the block's units that are not masked."""
        W = weight_matrix(self.model.get_submodule(block.consumer))
        columns = kept_columns(block, self.kept[block.name])
        gradient = self._calibrated.gradients.get(block.name)
        position = torch.full((len(W),), -1)
        position[columns] = torch.arange(len(columns))
        return Problem(
            [restrict(fold, columns) for fold in moments.of_folds(W)],
            W[columns.to(W.device)],
            position[block.columns[self.kept[block.name]]].to(W.device),
            self._calibrated.metrics.get(block.name),
            gradient=None if gradient is None else gradient[columns],
        )

    def _prune(
        self, block: Block, moments: BlockMoments, width: int, chosen: Choice | None = None
    ) -> tuple[MaskEdit, dict[str, Any]]:
        """Choose `width` of the block's present units, unless its tie has, and write the weights that read them."""
        start = time.perf_counter()
        consumer: Any = self.model.get_submodule(block.consumer)
        W, present = weight_matrix(consumer), self.kept[block.name]
        problem = self._problem(block, moments)
        solution = solve(problem, width, Settings.of(self.config), chosen)
        columns = kept_columns(block, present)[solution.kept_columns.cpu()]
        held_out = moments.held_out_error(W, columns, solution.V, solution.bias_shift)
        # Every process trains the same units, although sums over the same data may differ in the last bit.
        units, V, shift = broadcast((solution.kept_units.to(W.device), solution.V, solution.bias_shift))
        bias = None if consumer.bias is None else consumer.bias.detach() + shift.to(consumer.bias)
        edit = MaskEdit(self.model, block, present[units.cpu()], V, bias)
        return edit, {
            "fitted_error": solution.fitted_error,
            "held_out_error": solution.fitted_error if held_out is None else held_out,
            "shrinkage": solution.shrinkage if self.config.reweight else None,
            "method": f"gradual, {solution.method}",
            "guarantee": None,
            "seconds": time.perf_counter() - start,
        }

    def _report(self, block: Block) -> BlockReport:
        if block.name not in self._solutions:
            return BlockReport.whole(block)
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
