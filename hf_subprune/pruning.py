"""`prune`: the one place that joins the stages."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial
from importlib.metadata import version
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from .advance import plan
from .allocation import (
    TRIAL_FRACTIONS,
    Points,
    Propagation,
    check_target,
    choose_widths,
    fill_in,
    measured_blocks,
)
from .blocks import Block, Refusal, by_tie
from .budgets import interpolate
from .calibration import CalibrationSet, prepare
from .collection import FOLDS, BlockMoments, collect, consumer_weight
from .config import TARGETS, PruneConfig
from .curves import LossCurve, loss_curve
from .evaluation import count_macs, count_parameters, drift, measure_latency, model_outputs
from .layout import choose_layout
from .probe import discover
from .report import Allocation, BlockReport, Change, PruneReport
from .reweighting import relative_error
from .sensitivity import output_metrics
from .solver import BlockSolution, solve_block
from .surgery import Edit, shrink, taken_back, undo_all
from .targets import Target, latency_ratio, narrowed, resolve
from .tied import Problem, choose_together, order_together
from .verification import verify

logger = logging.get_logger(__name__)

_T = TypeVar("_T")

# Moments of all blocks are held between the survey and the solutions up to this size, else they are collected twice.
_STORED_BYTES = 2 * 2**30

# A latency target is met when what is measured lies between this fraction of it and the target itself.
_LATENCY_SLACK = 0.94
_LATENCY_TRIES = 3


def prune(
    model: PreTrainedModel,
    data: Any,
    config: PruneConfig | None = None,
    processing_class: Any = None,
    *,
    evaluation: Callable[[PreTrainedModel], float] | None = None,
) -> PruneReport:
    """Remove units of a pretrained model and compute new weights for the layers that read them.

    For every block, the units to keep and the new consumer weights minimise the change of the consumer's output on the
    calibration samples (El Halabi et al., NeurIPS 2022, arXiv 2203.04940). Labels are never used.

    Args:
        model: Shrunk in place. If anything fails, it is exactly as it was before.
        data: `datasets.Dataset` or `IterableDataset`, list of strings, list of images, or iterable of ready batches
            (dicts of tensors). See `calibration.prepare`.
        config: What to keep and how; `PruneConfig()` when left out.
        processing_class: Tokenizer, image processor or processor, as in `Trainer`; not needed for ready batches.
        evaluation: Quality of a model, more is better, for budget `"equal_loss"` in the paper's labelled form. It is
            called twice a block, and once for the original.

    Returns:
        What was done and measured. `model.save_pretrained(folder)` then writes a model that loads again with
        `from_pretrained`.

    Raises:
        TypeError: the model is not a `PreTrainedModel`, or the data has a type that is not understood.
        ValueError: the model cannot be pruned as it is (quantized, on the meta device, wrapped by PEFT, no prunable
            block), or the data or the budget does not allow it.
        EquivalenceError: the shrunk model is not the masked model; nothing was changed.
    """
    config = config or PruneConfig()
    check_prunable(model)
    with _eval_mode(model), ExitStack() as undo:
        report = Calibrated(model, data, [config], processing_class, evaluation).prune_to(config, undo)
        undo.pop_all()
    return report


def prune_sizes(
    model: PreTrainedModel,
    data: Any,
    configs: Sequence[PruneConfig],
    processing_class: Any = None,
    *,
    evaluation: Callable[[PreTrainedModel], float] | None = None,
) -> Iterator[PruneReport]:
    """Prune one model to several sizes, one after the other, from one calibration.

    Data, discovery, sensitivities and curves are shared; so are the moments, where they fit in memory and the variant
    is `"layer"`. While the caller holds a report, the model is pruned to its size (save it, evaluate it); when the
    next one is asked for, and at the end, the model is what it was.

    Args:
        model: The very same when the iterator is exhausted or closed.
        data: As for `prune`.
        configs: One a size; they may differ in `keep`, `params`, `macs`, `latency`, `size`, `budget`, `layout` and
            `round_to` only.
        processing_class: As for `prune`.
        evaluation: As for `prune`.

    Yields:
        The report of each size, in the order of the configs.

    Raises:
        ValueError: the configs differ in something else; or as `prune`.
    """
    check_prunable(model)
    _check_alike(configs)
    with _eval_mode(model):
        run = Calibrated(model, data, configs, processing_class, evaluation)
        for config in configs:
            with ExitStack() as undo:
                yield run.prune_to(config, undo)


class Calibrated:
    """A model with all that pruning it to any of several sizes needs: data, blocks, sensitivities, curves, moments.

    Args:
        model: In eval mode; unchanged until `prune_to`.
        data: As for `prune`.
        configs: The sizes; they differ in size only.
        processing_class: As for `prune`.
        evaluation: As for `prune`.

    Attributes:
        blocks: That the config lets us prune, in forward order.
        losses: By block name, `(width, predicted drift)` points; empty when every budget is uniform.
        curves: By block name, what the points were made from.
        stored: By block name, the moments of the original model; `None` where they are collected again for each size.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        data: Any,
        configs: Sequence[PruneConfig],
        processing_class: Any = None,
        evaluation: Callable[[PreTrainedModel], float] | None = None,
    ):
        self.model, self.evaluation = model, evaluation
        self.clock = _Clock()
        first = configs[0]
        with self.clock("data"):
            self.calibration = prepare(model, data, first, processing_class)
        self.probe = self.calibration.probe
        with self.clock("discovery"):
            self.found = discover(model, self.probe)
            self.blocks = choose_blocks(self.found.blocks, self.found.refusals, first)
        with self.clock("targets"):
            self.targets = [resolve(model, self.blocks, c, self.calibration.held_out[0]) for c in configs]
            for config, target in zip(configs, self.targets, strict=True):
                check_target(self.blocks, target, config)
        self.configs = list(configs)
        pairs = list(zip(configs, self.targets, strict=True))
        self.candidates = [b for b in self.blocks if any(_may_shrink(b, target) for target in self.targets)]
        needs_curves = any(c.allocation() != "uniform" for c, _ in pairs) and bool(self.candidates)
        needs_metrics = first.loss_aware and bool(self.candidates) and (needs_curves or first.importance == "greedy")
        if evaluation is not None and not any(c.allocation() == "equal_loss" for c in configs):
            raise ValueError("`evaluation` is read by budget='equal_loss' only: choose that budget, or leave it out.")
        with self.clock("discovery"):
            self.plan = plan(model, self.candidates, self.probe)
        if self.plan.unreached:
            names = ", ".join(b.name for b in self.plan.unreached)
            raise ValueError(
                f"The calibration data never reaches {names}: pass data that runs this part of the model, or leave it "
                f"whole with `exclude`."
            )
        with self.clock("evaluation"):
            self.reference = model_outputs(model, self.calibration.held_out)
            self.before = _measure(model, self.calibration)
        self.metrics: dict[str, torch.Tensor] = {}
        if needs_metrics:
            with self.clock("sensitivity"):
                self.metrics = self._sensitivities(first)
        self.curves: dict[str, LossCurve] = {}
        self.losses: dict[str, Points] = {}
        self.stored: dict[str, BlockMoments] | None = None
        share = first.variant == "layer" and (needs_curves or len(configs) > 1)
        if share and sum(_moment_bytes(model, b) for b in self.candidates) <= _STORED_BYTES:
            self.stored = {}
        if needs_curves or self.stored is not None:
            self._survey(first, needs_curves)

    def _sensitivities(self, config: PruneConfig) -> dict[str, torch.Tensor]:
        metrics = output_metrics(self.model, self.candidates, self.calibration.fit, seed=config.seed)
        silent = [name for name, M in metrics.items() if not float(M.diagonal().sum()) > 0]
        if silent:
            logger.warning(f"The model's output does not depend on {', '.join(silent)}: all errors count alike there.")
        return {name: M for name, M in metrics.items() if name not in silent}

    def _survey(self, config: PruneConfig, curves: bool) -> None:
        """One pass over the original model: what each block would lose at every width, and its moments."""
        factors: dict[str, float] = {}
        points: dict[str, Points] = {}
        propagation = Propagation(self.model, self.calibration, self.evaluation) if curves else None
        measured = {b.name for b in self.candidates} if self.evaluation else measured_blocks(self.candidates)
        waiting: dict[str, list[tuple[Block, Problem]]] = {}
        members = {block: len(tie) for tie in by_tie(self.candidates) for block in tie}
        with _progress(len(self.plan.segments), "Calibrating") as bar:
            steps = collect(self.model, self.plan, self.calibration, "layer", {}, bar.update)
            for block, moments in _timed(steps, self.clock, "calibration"):
                if self.stored is not None:
                    self.stored[block.name] = moments
                if propagation is None:
                    continue
                together = waiting.setdefault(block.tie or block.name, [])
                together.append((block, self._problem(block, moments)))
                if len(together) < members[block]:
                    continue
                del waiting[block.tie or block.name]
                blocks, problems = [one for one, _ in together], [problem for _, problem in together]
                with self.clock("curves"):
                    order = None if block.tie is None else order_together(problems, config.shrinkage)
                    found = [
                        loss_curve(
                            problem.folds,
                            problem.W,
                            problem.groups,
                            shrinkage=config.shrinkage,
                            output_metric=problem.output_metric,
                            reweight_kept=config.reweight,
                            trial_fractions=TRIAL_FRACTIONS if block.name in measured else (),
                            order=order,
                        )
                        for problem in problems
                    ]
                with self.clock("propagation"):
                    names = [one.name for one in blocks]
                    if self.evaluation is not None:
                        points |= dict.fromkeys(names, propagation.points(blocks, found))
                    elif block.name in measured:
                        factors |= dict.fromkeys(names, propagation.factor(blocks, found))
                    for name, curve in zip(names, found, strict=True):
                        curve.trials.clear()
                        self.curves[name] = curve
                del together, problems
        filled = fill_in(self.candidates, factors)
        for name, curve in self.curves.items():
            self.losses[name] = points.get(name) or tuple((w, filled[name] * e) for w, e in curve.points)

    def _widths(self, config: PruneConfig, target: Target) -> dict[str, int]:
        losses = {b.name: self.losses.get(b.name, ((b.units, 0.0),)) for b in self.blocks}
        widths = choose_widths(self.blocks, target, config, losses)
        if target.name != "latency":
            return widths
        # What blocks save together is not quite the sum of what was timed: aim again at what was missed.
        aimed = target
        for _ in range(_LATENCY_TRIES):
            taken = self._full_latency(target) * latency_ratio(
                self.model, self.calibration.held_out[0], partial(narrowed, self.model, self.blocks, widths)
            )
            if _LATENCY_SLACK * target.limit <= taken <= target.limit:
                break
            (part,) = aimed.parts
            limit = part.limit + (1 + _LATENCY_SLACK) / 2 * target.limit - taken
            aimed = replace(aimed, parts=(replace(part, limit=limit),))
            try:
                widths = choose_widths(self.blocks, aimed, config, losses)
            except ValueError:
                break
        return widths

    def _full_latency(self, target: Target) -> float:
        return target.cost({b.name: b.units for b in self.blocks})

    def _reached(self, target: Target, widths: dict[str, int], edits: dict[str, Edit]) -> float:
        """What the pruned model costs, in the target's unit; latency is measured, against the original's in turns."""
        if target.name != "latency":
            return target.cost(widths)
        pruned_over = latency_ratio(self.model, self.calibration.held_out[0], partial(taken_back, edits))
        return self._full_latency(target) / pruned_over

    def prune_to(self, config: PruneConfig, undo: ExitStack) -> PruneReport:
        """Prune to the size of one config; `undo` gets what takes it back."""
        model, calibration = self.model, self.calibration
        clock = _Clock(self.clock.seconds)
        target = self.targets[self.configs.index(config)]
        with clock("allocation"):
            widths = self._widths(config, target)
            to_prune = [b for b in self.blocks if widths[b.name] < b.units]
        edits: dict[str, Edit] = {}
        undo.callback(lambda: undo_all(edits))
        solutions: dict[str, BlockReport] = {}
        with _progress(len(to_prune), "Pruning") as bar:
            for tie in by_tie(b for b in to_prune if b.tie):
                self._prune_tie(tie, widths[tie[0].name], config, edits, solutions, clock)
                bar.update(len(tie))
            alone = [b for b in to_prune if b.tie is None]
            with taken_back(edits) if config.variant == "layer" else nullcontext():
                for block, moments in _timed(self._moments(alone, config, edits), clock, "calibration"):
                    with clock("selection"):
                        solution = self._prune_block(block, moments, widths[block.name], config)
                    solutions[block.name], edits[block.name] = solution
                    del moments
                    bar.update()

        kept = {name: torch.tensor(solution.kept_units) for name, solution in solutions.items()}
        with clock("verification"), taken_back(edits):
            verify(model, to_prune, kept, self.probe)
        with clock("evaluation"):
            reached = self._reached(target, widths, edits)
        with clock("layout"):
            layout = choose_layout(model, config.layout, inputs=self.probe)
            undo.callback(layout.undo)
        with clock("evaluation"):
            after = _measure(model, calibration)
            change = drift(model, calibration.held_out, self.reference)
        logger.info("Pruned %d blocks.", len(edits))
        before = self.before
        return PruneReport(
            model=getattr(model, "name_or_path", "") or "",
            architecture=type(model).__name__,
            config=config.to_dict(),
            blocks=tuple(solutions.get(b.name) or self._whole(b) for b in self.blocks),
            refusals=self.found.refusals,
            layout=layout.kind,
            layout_reason=layout.reason,
            parameters=Change(before["parameters"], after["parameters"]),
            macs=Change(before["macs"], after["macs"]),
            latency=Change(before["latency"], after["latency"]),
            measured_on=before["on"],
            drift=change.to_dict(),
            data=calibration.description,
            seconds=clock.seconds,
            peak_memory=_peak_memory(),
            versions={name: version(name) for name in ("hf_subprune", "torch", "transformers")},
            allocation=self._allocation(config, target, widths, reached),
        )

    def _moments(
        self, to_prune: Sequence[Block], config: PruneConfig, edits: dict[str, Edit]
    ) -> Iterator[tuple[Block, BlockMoments]]:
        if self.stored is not None:
            return ((block, self.stored[block.name]) for block in to_prune)
        return collect(self.model, plan(self.model, to_prune, self.probe), self.calibration, config.variant, edits)

    def _prune_tie(
        self,
        tie: Sequence[Block],
        width: int,
        config: PruneConfig,
        edits: dict[str, Edit],
        solutions: dict[str, BlockReport],
        clock: "_Clock",
    ) -> None:
        """Select the units of tied blocks from the original model's moments of all, reweight and shrink each."""
        with clock("calibration"), taken_back(edits):
            moments = list(self._moments(tie, replace(config, variant="layer"), {}))
        with clock("selection"):
            chosen = choose_together(
                [self._problem(block, own) for block, own in moments],
                width,
                shrinkage=config.shrinkage,
                importance=config.importance,
                method=config.method,
                swaps=None if config.swaps < 0 else config.swaps,
                generator=torch.Generator().manual_seed(config.seed),
            )
            for block, own in moments:
                solutions[block.name], edits[block.name] = self._prune_block(block, own, width, config, chosen)

    def _problem(self, block: Block, moments: BlockMoments) -> Problem:
        """What selection and reweighting need of one block."""
        W = consumer_weight(self.model.get_submodule(block.consumer))
        folds = [fold.moments(W) for fold in moments.folds if fold.rows]
        return Problem(folds, W, block.columns, self.metrics.get(block.name))

    def _prune_block(
        self,
        block: Block,
        moments: BlockMoments,
        width: int,
        config: PruneConfig,
        chosen: tuple[torch.Tensor, str] | None = None,
    ) -> tuple[BlockReport, Edit]:
        """Select (unless units were chosen for all blocks of a tie), reweight and shrink one block."""
        start = time.perf_counter()
        consumer: Any = self.model.get_submodule(block.consumer)
        problem = self._problem(block, moments)
        solution: BlockSolution = solve_block(
            problem.folds,
            None,
            problem.W,
            problem.groups,
            width,
            shrinkage=config.shrinkage,
            importance=config.importance,
            method=config.method,
            swaps=None if config.swaps < 0 else config.swaps,
            reweight_kept=config.reweight,
            output_metric=problem.output_metric,
            generator=torch.Generator().manual_seed(config.seed),
            chosen=chosen,
        )
        held_out = moments.held_out.moments(problem.W)
        error = relative_error(held_out, solution.kept_columns, solution.V, solution.bias_shift)
        bias = None if consumer.bias is None else consumer.bias.detach() + solution.bias_shift.to(consumer.bias)
        edit = shrink(self.model, block, solution.kept_units, weight=solution.V, bias=bias)
        return BlockReport(
            name=block.name,
            kind=block.kind,
            consumer=block.consumer,
            units_before=block.units,
            units_after=width,
            kept_units=tuple(solution.kept_units.tolist()),
            kept_columns=tuple(solution.kept_columns.tolist()),
            fitted_error=solution.fitted_error,
            held_out_error=error,
            shrinkage=solution.shrinkage if config.reweight else None,
            method=solution.method,
            guarantee=None if solution.certificate is None else solution.certificate.fraction,
            seconds=time.perf_counter() - start,
            **self._predictions(block, width),
        ), edit

    def _whole(self, block: Block) -> BlockReport:
        """A block that keeps every unit."""
        return BlockReport(
            name=block.name,
            kind=block.kind,
            consumer=block.consumer,
            units_before=block.units,
            units_after=block.units,
            kept_units=tuple(range(block.units)),
            kept_columns=tuple(sorted(block.columns.flatten().tolist())),
            fitted_error=0.0,
            held_out_error=0.0,
            shrinkage=None,
            method="kept whole",
            guarantee=1.0,
            seconds=0.0,
            **self._predictions(block, block.units),
        )

    def _predictions(self, block: Block, width: int) -> dict[str, Any]:
        """The block's curves, for the report."""
        if block.name not in self.curves:
            return {}
        curve, losses = self.curves[block.name], self.losses[block.name]
        widths = sorted({w for w, _ in curve.points} | {width})
        relative = tuple((w, float(curve.relative[w])) for w in widths)
        return {"curve": relative, "predicted": losses}

    def _allocation(self, config: PruneConfig, target: Target, widths: dict[str, int], reached: float) -> Allocation:
        predicted = None
        if self.losses:
            predicted = sum(interpolate(points, [widths[name]])[0] for name, points in self.losses.items())
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
    n = consumer_weight(model.get_submodule(block.consumer)).shape[0]
    return (FOLDS + 1) * n * n * 8


def _check_alike(configs: Sequence[PruneConfig]) -> None:
    """Raise `ValueError` unless configs differ in size only."""
    if not configs:
        raise ValueError("Pruning to several sizes takes one config a size, got none.")
    free = {*TARGETS, "budget", "layout", "round_to"}
    first = configs[0].to_dict()
    for config in configs[1:]:
        other = config.to_dict()
        if differing := sorted(name for name in first if name not in free and first[name] != other[name]):
            raise ValueError(
                f"Sizes from one calibration may differ in {', '.join(sorted(free))} only; these configs differ in "
                f"{', '.join(differing)}: call `prune` for each."
            )


def check_prunable(model: Any) -> None:
    """Refuse what cannot be pruned, before any work.

    Raises:
        TypeError: not a `PreTrainedModel`.
        ValueError: quantized, PEFT-wrapped, or on the meta device; the message says what to do instead.
    """
    if hasattr(model, "peft_config"):
        raise ValueError(
            f"{type(model).__name__} carries PEFT adapters: merge them first (`model = model.merge_and_unload()`), "
            "then prune the merged model."
        )
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"`model` must be a transformers.PreTrainedModel, got {type(model).__name__}. A wrapper such as a "
            "SentenceTransformer holds one: pass that."
        )
    if getattr(model, "is_quantized", False):
        raise ValueError(
            f"{type(model).__name__} is quantized ({getattr(model, 'quantization_method', 'unknown method')}): prune "
            "the full-precision checkpoint, then quantize the pruned one."
        )
    on_meta = next((name for name, p in model.named_parameters() if p.is_meta), None)
    if on_meta is not None:
        raise ValueError(f"Parameter {on_meta} is on the meta device and has no values: load the weights first.")


def choose_blocks(blocks: Sequence[Block], refusals: Sequence[Refusal], config: PruneConfig) -> list[Block]:
    """The blocks that the config lets us prune.

    Raises:
        ValueError: a pattern matches nothing, a tie is chosen in part, or no block is left; the message lists what
            there is.
    """
    names = [b.name for b in blocks]
    for option in ("include", "exclude"):
        for pattern in getattr(config, option):
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ValueError(
                    f"`{option}` pattern {pattern!r} matches no block; the blocks are {', '.join(names)}."
                )
    chosen = [
        b
        for b in blocks
        if b.kind in config.units
        and (not config.include or any(fnmatchcase(b.name, p) for p in config.include))
        and not any(fnmatchcase(b.name, p) for p in config.exclude)
    ]
    for tie in by_tie(b for b in blocks if b.tie):
        part = [b.name for b in tie if b in chosen]
        if 0 < len(part) < len(tie):
            rest = [b.name for b in tie if b not in chosen]
            raise ValueError(
                f"Blocks {tie[0].tie!r} must all keep the same units, but the config prunes {', '.join(part)} and not "
                f"{', '.join(rest)}: `include` or `exclude` all of them."
            )
    if not chosen:
        there = ", ".join(f"{b.name} ({b.kind})" for b in blocks) or "none"
        why = "".join(f"\n  {r.name}: {r.reason} {r.advice}" for r in refusals)
        raise ValueError(
            f"No prunable block is left: units={list(config.units)}, include={list(config.include)}, "
            f"exclude={list(config.exclude)}; prunable blocks found: {there}.{why}"
        )
    return chosen


def _measure(model: PreTrainedModel, calibration: CalibrationSet) -> dict[str, Any]:
    latency = measure_latency(model, calibration.held_out[0])
    return {
        "parameters": count_parameters(model),
        "macs": count_macs(model, calibration.held_out[0]),
        "latency": latency.seconds,
        "on": latency.measured_on,
    }


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Dropout off for the time being; every module gets its own flag back."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, flag in training.items():
            module.training = flag


@contextmanager
def _progress(total: int, description: str) -> Iterator[Any]:
    """A bar on the main process, on a terminal only; `transformers.utils.logging.disable_progress_bar` hides it."""
    hidden = None if PartialState().is_main_process else True
    with logging.tqdm(total=total, desc=description, disable=hidden) as bar:
        yield bar


class _Clock:
    """Wall time of named stages, added up."""

    def __init__(self, seconds: Mapping[str, float] | None = None) -> None:
        self.seconds = dict(seconds or {})

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


def _timed(
    steps: Iterator[tuple[Block, BlockMoments]], clock: _Clock, stage: str
) -> Iterator[tuple[Block, BlockMoments]]:
    """The steps, their making timed; none is held on to."""
    while True:
        with clock(stage):
            step = next(steps, None)
        if step is None:
            return
        yield step
        del step


def _peak_memory() -> int:
    """Largest resident size of this process so far, bytes."""
    import resource  # POSIX only

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
