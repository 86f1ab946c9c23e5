"""What is known of a model before it is pruned: its blocks, what each would lose at any width, who keeps how much."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..blocks import Block, Discovery, by_tie, by_width, choose_blocks, some_of
from ..collection.block_moments import FOLDS, BlockMoments
from ..collection.planning import plan
from ..collection.segments import Plan
from ..collection.sensitivity import Means, activation_gradients, output_metrics
from ..collection.walk import collect
from ..config import TWO_STREAMS, PruneConfig
from ..data.batches import CalibrationSet
from ..discovery.discover import discover
from ..evaluation.costs import Costs, count, times_in_turn
from ..evaluation.drift import Outputs, model_outputs
from ..models.forms import together
from ..models.linears import matrix_shape, weight_matrix
from ..models.offload import input_device, is_offloaded
from ..report.records import Allocation, Change
from ..runs.durable import check_space, once
from ..runs.memory import release_memory
from ..runs.processes import from_all, from_process, is_mine, processes
from ..runs.progress import Clock, progress, timed
from ..solver.curves import LossCurve, loss_curve, losses_of_sets
from ..solver.problem import Problem
from ..solver.settings import Settings
from ..solver.tied import order_together
from ..storage.layout import choose_layout
from ..surgery.edits import Edit, taken_back
from .budgets import interpolate
from .propagation import TRIAL_FRACTIONS, Points, Propagation, fill_in, measured_blocks
from .targets import Target, narrowed, resolve
from .widths import check_target, choose_widths

logger = logging.get_logger(__name__)

# Moments of all blocks are held between the survey and the solutions up to this size, else they are collected twice.
_STORED_BYTES = 2 * 2**30

# A latency target is met when what is measured, in so many seconds, lies between this fraction of it and the target.
_LATENCY_SLACK = 0.94
_LATENCY_TRIES = 5
_LATENCY_SECONDS = 4.0
# Seconds that the latencies of other runs are measured in.
_REPORTED_SECONDS = 0.3


class Calibrated:
    """A model with all that pruning it to any of several sizes needs: data, blocks, sensitivities, curves, moments.

    Args:
        model: In eval mode, what it stacks apart (`stacked.apart`); left as it is.
        calibration: The batches.
        configs: The sizes; they differ in size only.
        evaluation: As for `prune`.
        folder: Where what is found is kept in files rather than in memory, and read again when a run that was stopped
            is started again with the same model, data and config; nothing is written without one.
        clock: Of the stages before this.

    Attributes:
        found: All blocks and refusals.
        blocks: That the config lets us prune, in forward order.
        losses: By block name, `(width, predicted drift)` points; empty when every budget is uniform.
        query_losses: The same of query heads, for the blocks that could lose these instead.
        curves: By block name, what the points were made from.
        metrics: By block name, `M` of `sensitivity.output_metrics`; blocks left out weigh outputs equally.
        gradients: By block name, `sensitivity.activation_gradients`, where the importance reads them.
        stored: By block name, the moments of the original model; `None` where they are collected again for each size.
        owners: By block name, the process that solves the block.
        reference: The original's outputs on `calibration.own_held_out`.
        before: What the original costs.
        clock: Of the stages so far.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        calibration: CalibrationSet,
        configs: Sequence[PruneConfig],
        evaluation: Callable[[PreTrainedModel], float] | None = None,
        folder: Path | None = None,
        clock: Clock | None = None,
    ):
        self.model, self.calibration, self.evaluation, self.folder = model, calibration, evaluation, folder
        self.clock = clock or Clock()
        first = configs[0]
        if "experts" in first.units:
            raise ValueError("Whole experts are removed by `prune`, to one size, not in training: leave them out.")
        self.probe = send_to_device(self.calibration.probe, input_device(model))
        self.configs = list(configs)
        found = self._once("blocks.pt", self._find)  # in one file: a block is one object everywhere
        self.found, self.blocks, self.targets, self.candidates, self.plan = found
        self.targets = from_process(0, self.targets)  # latencies differ from process to process
        # Processes take turns; what a curve or a selection needs of several blocks goes to one of them.
        groups = enumerate(by_width(self.blocks) if self._needs_curves() else by_tie(self.blocks))
        self.owners = {block.name: turn % processes() for turn, group in groups for block in group}
        needs_curves = self._needs_curves()
        needs_metrics = first.loss_aware and bool(self.candidates) and (needs_curves or first.importance == "greedy")
        if evaluation is not None and not any(c.allocation() == "equal_loss" for c in configs):
            raise ValueError("`evaluation` is read by budget='equal_loss' only: choose that budget, or leave it out.")
        if folder is not None:
            check_space(folder, self._scratch_bytes() if needs_metrics else 0, "what the run keeps of each layer")
        with self.clock("evaluation"):
            self.reference, self.before = self._once("original.pt", self._measure)
        self.metrics: Mapping[str, torch.Tensor] = {}
        self.gradients: Mapping[str, torch.Tensor] = {}
        with self.clock("sensitivity"):
            if needs_metrics:
                self.metrics = self._once("sensitivities.pt", self._sensitivities)
            if first.importance == "activation_gradient":
                self.gradients = self._once("gradients.pt", self._activation_gradients)
        self.curves: dict[str, LossCurve] = {}
        self.losses: dict[str, Points] = {}
        self.query_losses: dict[str, Points] = {}
        self.stored: dict[str, BlockMoments] | None = None
        grouped = any(b.queries is not None for b in self.candidates)  # these are looked at before they are pruned
        share = first.streams() == "layer" and (needs_curves or len(configs) > 1 or grouped)
        if folder is None and share and sum(_moment_bytes(model, b) for b in self.candidates) <= _STORED_BYTES:
            self.stored = {}
        if needs_curves or self.stored is not None:
            surveyed = self._once("curves.pt", lambda: self._survey(first, needs_curves))
            self.curves, self.losses, self.query_losses = surveyed
        release_memory()

    def _needs_curves(self) -> bool:
        return any(config.allocation() != "uniform" for config in self.configs) and bool(self.candidates)

    def _file(self, name: str) -> Path | None:
        return None if self.folder is None else self.folder / name

    def _once(self, name: str, compute: Callable[[], Any]) -> Any:
        """`durable.once`, by all processes together: a stop may have come when only some had written their files."""
        path = self._file(name)
        if path is not None and not all(from_all(path.exists())):
            path.unlink(missing_ok=True)
        return once(path, compute)

    def _find(self) -> tuple[Discovery, list[Block], list[Target], list[Block], Plan]:
        model, calibration = self.model, self.calibration
        with self.clock("discovery"):
            found = discover(model, self.probe)
            blocks = choose_blocks(found.blocks, found.refusals, self.configs[0])
        with self.clock("targets"):
            targets = resolve(model, blocks, self.configs, calibration.held_out[0])
            for config, target in zip(self.configs, targets, strict=True):
                widths = check_target(blocks, target, config)
                if config.layout == "stock":  # refused now rather than after the work
                    with narrowed(model, blocks, widths), together(model):
                        choose_layout(model, "stock", inputs=self.probe).undo()
        candidates = [b for b in blocks if any(_may_shrink(b, target) for target in targets)]
        with self.clock("discovery"):
            segments = plan(model, candidates, self.probe)
        return found, blocks, targets, candidates, segments

    def _scratch_bytes(self) -> int:
        """At most: what is kept of the calibration samples (twice, while a layer runs), sensitivities, new weights."""
        shapes = [matrix_shape(self.model.get_submodule(block.consumer)) for block in self.candidates]
        itemsize = self.model.dtype.itemsize
        batches = (*self.calibration.fit, *self.calibration.held_out)
        rows = sum(next(iter(batch.values())).numel() for batch in batches)
        states = (
            2 * rows * max(m for _, m in shapes) * itemsize * (2 if self.configs[0].streams() in TWO_STREAMS else 1)
        )
        return states + sum(8 * m * m + 2 * n * m * itemsize for n, m in shapes)

    def _measure(self) -> tuple[list[Outputs], Costs]:
        calibration = self.calibration
        return model_outputs(self.model, calibration.own_held_out), count(self.model, calibration.held_out[0])

    def look_again(self) -> None:
        """Replace `metrics` and `gradients` by those of the model as it is now."""
        self.metrics = self._sensitivities() if self.metrics else {}
        self.gradients = self._activation_gradients() if self.gradients else {}

    def _activation_gradients(self) -> Mapping[str, torch.Tensor]:
        return activation_gradients(
            self.model,
            self.candidates,
            self.calibration.fit,
            seed=self.configs[0].seed,
            recomputed=self._recomputed(),
        )

    def _recomputed(self) -> list[str]:
        """Modules that a backward runs once more, so that it need not hold weights that are offloaded."""
        return [segment.path for segment in self.plan.segments] if is_offloaded(self.model) else []

    def _sensitivities(self) -> Means:
        folder = self._file("sensitivities")
        if folder is not None:
            folder.mkdir(exist_ok=True)
        metrics = output_metrics(
            self.model,
            self.candidates,
            self.calibration.fit,
            seed=self.configs[0].seed,
            recomputed=self._recomputed(),
            folder=folder,
        )
        silent = [name for name, M in metrics.items() if not float(M.diagonal().sum()) > 0]
        if silent:
            logger.warning(f"The model's output does not depend on {some_of(silent)}: all errors count alike there.")
        return metrics.without(silent)

    def _survey(
        self, config: PruneConfig, needed: bool
    ) -> tuple[dict[str, LossCurve], dict[str, Points], dict[str, Points]]:
        """One pass over the original model: what each block would lose at every width if needed, and its moments."""
        settings = Settings.of(config)
        curves: dict[str, LossCurve] = {}
        factors: dict[str, float] = {}
        points: dict[str, Points] = {}
        of_queries: dict[str, Points] = {}
        propagation = Propagation(self.model, self.calibration, self.evaluation) if needed else None
        measured = {b.name for b in self.candidates} if self.evaluation else measured_blocks(self.candidates)
        waiting: dict[str, list[tuple[Block, Problem, int]]] = {}
        members = {block: len(group) for group in by_width(self.candidates) for block in group}
        with progress(len(self.plan.segments), "Calibrating") as bar:
            steps = collect(self.model, self.plan, self.calibration, "layer", {}, bar.update, owners=self.owners)
            for block, moments in timed(steps, self.clock, "calibration"):
                if not is_mine(self.owners[block.name]):
                    continue
                if self.stored is not None:
                    self.stored[block.name] = moments
                if propagation is None:
                    continue
                together = waiting.setdefault(block.tie or block.stack or block.name, [])
                last = self.stored is None
                together.append((block, self.problem(block, moments, last=last), moments.rows))
                if len(together) < members[block]:
                    continue
                del waiting[block.tie or block.stack or block.name]
                blocks, problems, rows = zip(*together, strict=True)
                with self.clock("curves"):
                    order = None if block.tie is None else order_together(problems, settings)
                    found = [
                        loss_curve(
                            problem,
                            settings,
                            trial_fractions=TRIAL_FRACTIONS if block.name in measured else (),
                            order=order,
                        )
                        for problem in problems
                    ]
                    if block.queries is not None and block.tie is None:
                        queries = replace(problems[0], groups=block.queries.columns, sets=block.queries.sets)
                        of_queries[block.name] = losses_of_sets(queries, settings)
                    if block.stack is not None:
                        found = [curve.of_share(n / sum(rows)) for curve, n in zip(found, rows, strict=True)]
                with self.clock("propagation"):
                    names = [one.name for one in blocks]
                    if self.evaluation is not None:
                        points |= dict.fromkeys(names, propagation.points(blocks, found))
                    elif block.name in measured:
                        factors |= dict.fromkeys(names, propagation.factor(blocks, found))
                    for name, curve in zip(names, found, strict=True):
                        curve.trials.clear()
                        curves[name] = curve
                del together, problems
        for theirs in from_all((curves, factors, points, of_queries)):
            for mine, others in zip((curves, factors, points, of_queries), theirs, strict=True):
                mine.update(others)  # type: ignore[attr-defined]
        filled = fill_in(self.candidates, factors)
        predicted = {name: tuple((w, filled[name] * e) for w, e in curve.points) for name, curve in curves.items()}
        predicted |= points
        for name, losses in of_queries.items():
            width, loss = predicted[name][0]
            (own,) = interpolate(curves[name].points, [width])
            factor = loss / own if own > 0 else 1.0
            of_queries[name] = tuple((w, factor * e) for w, e in losses)
        return curves, predicted, of_queries

    def widths(self, config: PruneConfig) -> dict[str, int]:
        """The width of every block, by name, for the size of one of the configs."""
        target = self.target(config)
        losses = self.predicted()
        widths = choose_widths(self.blocks, target, config, losses)
        if target.name != "latency":
            return from_process(0, widths)
        # What blocks save together is not quite the sum of what was timed: aim again at what was missed.
        aimed = target
        tried: list[tuple[bool, float, dict[str, int]]] = []
        for _ in range(_LATENCY_TRIES):
            fewer = partial(narrowed, self.model, self.blocks, widths)
            outside, inside = times_in_turn(self.model, self.calibration.held_out[0], fewer, _LATENCY_SECONDS)
            taken = self._full_cost(target) * inside / outside
            tried.append((taken <= target.limit, -abs(taken - target.limit), widths))
            if _LATENCY_SLACK * target.limit <= taken <= target.limit:
                break
            (part,) = aimed.parts
            limit = part.limit + (1 + _LATENCY_SLACK) / 2 * target.limit - taken
            aimed = replace(aimed, parts=(replace(part, limit=limit),))
            try:
                widths = choose_widths(self.blocks, aimed, config, losses)
            except ValueError:
                break
        *_, nearest = max(tried, key=lambda one: one[:2])
        return from_process(0, nearest)

    def predicted(self) -> dict[str, Points]:
        """`losses`, and nothing to lose of blocks that no target can take units from."""
        return {b.name: self.losses.get(b.name, ((b.units, 0.0),)) for b in self.blocks}

    def target(self, config: PruneConfig) -> Target:
        """What one of the configs asks for on this model."""
        return self.targets[self.configs.index(config)]

    def _full_cost(self, target: Target) -> float:
        return target.cost({b.name: b.units for b in self.blocks})

    def latency(self, edits: dict[str, Edit]) -> Change | None:
        """Seconds of a forward without and with the edits; `None` where weights are read from elsewhere meanwhile."""
        if is_offloaded(self.model):
            return None
        targets = {config.target() for config in self.configs}
        seconds = _LATENCY_SECONDS if "latency" in targets else _REPORTED_SECONDS
        after, before = times_in_turn(self.model, self.calibration.held_out[0], partial(taken_back, edits), seconds)
        return Change(before, after)

    def reached(
        self, config: PruneConfig, pruned: Sequence[Block], widths: Mapping[str, int], latency: Change | None
    ) -> float:
        """What the pruned model costs, in the target's unit; for a latency target, from the `latency` measured."""
        target = self.target(config)
        if target.name == "latency" and latency is not None:
            return self._full_cost(target) * latency.ratio
        return self._full_cost(target) - target.saved(pruned, widths)

    def moments(
        self, to_prune: Sequence[Block], config: PruneConfig, edits: dict[str, Edit], folder: Path | None = None
    ) -> Iterator[tuple[Block, BlockMoments | None]]:
        """Blocks in forward order, with their moments for the config's variant in the process that owns the block."""
        if self.stored is not None:
            return ((block, self.stored.get(block.name)) for block in to_prune)
        segments = self.segments(to_prune)
        return collect(
            self.model, segments, self.calibration, config.streams(), edits, folder=folder, owners=self.owners
        )

    def segments(self, blocks: Sequence[Block]) -> Plan:
        """The plan to walk some of the blocks by."""
        return self.plan if list(blocks) == self.candidates else plan(self.model, blocks, self.probe)

    def problem(self, block: Block, moments: BlockMoments, *, last: bool = False) -> Problem:
        """What selection and reweighting need of one block; its moments are asked for no more if this is the last."""
        W = weight_matrix(self.model.get_submodule(block.consumer)).to(moments.device)
        metric = self.metrics.get(block.name)
        metric = None if metric is None else metric.to(moments.device)
        folds = moments.of_folds(W, last=last)
        return Problem(folds, W, block.columns, metric, block.sets, self.gradients.get(block.name))

    def predictions(self, block: Block) -> dict[str, Any]:
        """The block's curves, for the report; there are none of query heads."""
        if block.name not in self.curves or block.sets > 1:
            return {}
        return {"curve": self.curves[block.name].errors, "predicted": self.losses[block.name]}

    def allocation(
        self, config: PruneConfig, pruned: Sequence[Block], widths: Mapping[str, int], reached: float
    ) -> Allocation:
        """The target, what was reached, and how it was shared out, for the report."""
        target = self.target(config)
        predicted = None
        if self.losses:
            predicted = sum(
                interpolate((self.losses if b.sets == 1 else self.query_losses)[b.name], [widths[b.name]])[0]
                for b in pruned
            )
        return Allocation(
            budget=config.allocation(),
            target=target.name,
            unit=target.unit,
            limit=target.limit,
            reached=reached,
            predicted_drift=predicted,
            latencies=target.latencies,
        )


def _may_shrink(block: Block, target: Target) -> bool:
    """Whether a target can take units from a block."""
    return any(
        block.name in part.blocks and part.limit < sum(target.costs[name][-1] for name in part.blocks)
        for part in target.parts
    )


def _moment_bytes(model: nn.Module, block: Block) -> int:
    n, _ = matrix_shape(model.get_submodule(block.consumer))
    return (FOLDS + 1) * n * n * 8
