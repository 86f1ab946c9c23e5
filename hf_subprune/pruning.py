"""`prune`: the one place that joins the stages."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from accelerate.utils import send_to_device
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from transformers import PreTrainedModel
from transformers.utils import logging

from .allocation.query_heads import better_units
from .allocation.survey import Calibrated
from .blocks import Block, by_stack, by_tie
from .collection.block_moments import BlockMoments
from .collection.walk import finished_segments
from .config import TARGETS, PruneConfig
from .data.batches import CalibrationSet, with_fitting_batches
from .data.reading import prepare
from .evaluation.costs import Costs, circumstances, count, measure_latency
from .evaluation.drift import Outputs, drift, model_outputs
from .models.forms import apart, put_together
from .models.offload import input_device
from .models.precision import precise_products
from .models.session import check_prunable, session
from .report.records import BlockReport, Change
from .report.report import PruneReport
from .routing.removal import remove_experts, without_experts
from .runs.durable import once
from .runs.memory import peak_memory, release_memory
from .runs.processes import from_process, is_mine, processes
from .runs.progress import Clock, progress, timed
from .solver.solve import BlockSolution, solve_block
from .solver.tied import choose_together
from .storage.layout import choose_layout
from .surgery.edits import Edit, shrink, taken_back, undo_all
from .surgery.verification import verify

logger = logging.get_logger(__name__)


def prune(
    model: PreTrainedModel,
    data: Any,
    config: PruneConfig | Mapping[str, Any] | None = None,
    processing_class: Any = None,
    *,
    evaluation: Callable[[PreTrainedModel], float] | None = None,
) -> PruneReport:
    """Remove units of a pretrained model and compute new weights for the layers that read them.

    For every block, the units to keep and the new consumer weights minimise the change of the consumer's output on the
    calibration samples (El Halabi et al., NeurIPS 2022, arXiv 2203.04940). Labels are never used.

    Args:
        model: Shrunk in place. If anything fails, it is exactly as it was before. It may be dispatched by accelerate
            (`device_map`), with weights offloaded to the CPU or to disk, and stays so; new weights of offloaded layers
            are held in the CPU's memory.
        data: `datasets.Dataset` or `IterableDataset`, pandas `DataFrame`, list of strings, list of images, or iterable
            of ready batches (dicts of tensors). See `calibration.prepare`.
        config: What to keep and how, or a dict of the fields of `PruneConfig`; `PruneConfig()` when left out.
        processing_class: Tokenizer, image processor or processor, as in `Trainer`; not needed for ready batches.
        evaluation: Quality of a model, more is better, for budget `"equal_loss"` in the paper's labelled form. It is
            called twice a block, and once for the original.

    Returns:
        What was done and measured. `model.save_pretrained(folder)` then writes a model that loads again with
        `from_pretrained`.

    Raises:
        TypeError: the model is not a `PreTrainedModel`, or the config or the data has a type that is not understood.
        ValueError: the model cannot be pruned as it is (quantized, on the meta device, wrapped by PEFT, no prunable
            block), or the data or the budget does not allow it.
        EquivalenceError: the shrunk model is not the masked model; nothing was changed.
    """
    config = PruneConfig.of(config)
    if "experts" in config.units:
        check_prunable(model)
        return _prune_experts_first(model, data, config, processing_class, evaluation)
    check_prunable(model, offloaded=True)

    def run(calibration: CalibrationSet, _size: int) -> PruneReport:
        with ExitStack() as undo:
            report = prune_to(Calibrated(model, calibration, [config], evaluation, clock=clock), config, undo)
            undo.pop_all()
        return report

    with session(model):
        clock, calibration = _prepared(model, data, config, processing_class)
        return with_fitting_batches(calibration, run)


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
    if not isinstance(configs, Sequence):
        raise TypeError(f"`configs` must be a list of PruneConfig, one a size, not {type(configs).__name__}.")
    configs = [PruneConfig.of(config) for config in configs]
    _check_alike(configs)
    with session(model, precise=False):
        with precise_products(model.parameters()):
            clock, calibration = _prepared(model, data, configs[0], processing_class)
            calibrated = Calibrated(model, calibration, configs, evaluation, clock=clock)
        for config in configs:
            with ExitStack() as undo:
                with precise_products(model.parameters()):
                    report = prune_to(calibrated, config, undo)
                yield report


def _prepared(
    model: PreTrainedModel, data: Any, config: PruneConfig, processing_class: Any
) -> tuple[Clock, CalibrationSet]:
    clock = Clock()
    with clock("data"):
        return clock, prepare(model, data, config, processing_class)


Chosen = tuple[torch.Tensor, str]
"""Units `(k,)` that tied blocks keep, and the method that chose them."""

Solution = tuple[BlockReport, torch.Tensor, torch.Tensor, torch.Tensor | None]
"""Report, units kept, and the consumer's new weight `(k * c, m)` and bias `(m,)`, in its dtype; on the CPU."""


def prune_to(calibrated: Calibrated, config: PruneConfig, undo: ExitStack) -> PruneReport:
    """Prune a calibrated model to the size of one of its configs.

    Args:
        calibrated: Whose model is shrunk in place.
        config: One of those that it was calibrated for.
        undo: Gets what takes everything back.

    Raises:
        EquivalenceError: as `prune`.
    """
    model, calibration = calibrated.model, calibrated.calibration
    clock = Clock(calibrated.clock.seconds)
    with clock("allocation"):
        to_prune, kept_units = better_units(calibrated, calibrated.widths(config), config)
    edits: dict[str, Edit] = {}
    undo.callback(lambda: undo_all(edits))
    solutions: dict[str, BlockReport] = {}
    folder = None if calibrated.folder is None else calibrated.folder / "walk"

    pending: list[tuple[Block, Solution | None]] = []

    def solve(block: Block, moments: BlockMoments | None, chosen: Chosen | None = None) -> None:
        solution = None
        if is_mine(calibrated.owners[block.name]):
            path = None if calibrated.folder is None else calibrated.folder / "blocks" / f"{block.consumer}.pt"
            solution = once(path, partial(_solve, calibrated, block, moments, kept_units[block.name], config, chosen))
        pending.append((block, solution))

    def install() -> None:
        for block, solution in pending:
            solved = from_process(calibrated.owners[block.name], solution)
            solutions[block.name], kept, V, bias = solved  # type: ignore[misc]
            # A copy: the edit holds it, and with it the mapped file of all of the solution.
            edits[block.name] = shrink(model, block, kept.clone(), weight=V, bias=bias)
            bar.update()
        pending.clear()

    with progress(len(to_prune), "Pruning") as bar:
        for tie in by_tie(b for b in to_prune if b.tie):
            with clock("calibration"), taken_back(edits):
                together = list(calibrated.moments(tie, replace(config, variant="layer"), {}))
            with clock("selection"):
                chosen = _choose_together(calibrated, together, kept_units[tie[0].name], config)
                for block, moments in together:
                    solve(block, moments, chosen)
                install()
            release_memory()
        alone = [b for b in to_prune if b.tie is None]
        segments = calibrated.segments(alone).segments
        groups = [group for segment in segments for group in by_stack(segment.blocks)]
        # What the next block reads depends on this one, but for variant "layer", where each process solves one a time.
        last = set() if config.streams() == "layer" else {group[-1].name for group in groups}
        ends = {segment.blocks[-1].name for segment in segments}
        with taken_back(edits) if config.streams() == "layer" else nullcontext():
            for segment in segments[: finished_segments(folder)]:
                for block in segment.blocks:
                    solve(block, None)
                install()
                release_memory()
            for block, moments in timed(calibrated.moments(alone, config, edits, folder), clock, "calibration"):
                with clock("selection"):
                    solve(block, moments)
                    if block.name in last or (not last and len(pending) >= processes()):
                        install()
                del moments
                if not last or block.name in ends:  # not where forwards come that would take the memory again
                    release_memory()
            install()

    kept = {name: torch.tensor(solution.kept_units) for name, solution in solutions.items()}
    with clock("verification"), taken_back(edits):
        verify(model, to_prune, kept, calibrated.probe)
    with clock("evaluation"):
        latency = calibrated.latency(edits)
        reached = calibrated.reached(config, to_prune, kept_units, latency)
    undo.callback(put_together(model.modules()))
    logger.info("Pruned %d blocks.", len(edits))
    whole = (BlockReport.whole(b, **calibrated.predictions(b)) for b in calibrated.blocks)
    report = PruneReport(
        blocks=tuple(solutions.get(report.name, report) for report in whole),
        refusals=calibrated.found.refusals,
        allocation=calibrated.allocation(config, to_prune, kept_units, reached),
        **_outcome(model, calibration, calibrated.before, latency, calibrated.reference, config, clock, undo),
    )
    return from_process(0, report)


def _outcome(
    model: PreTrainedModel,
    calibration: CalibrationSet,
    before: Costs,
    latency: Change | None,
    reference: Sequence[Outputs],
    config: PruneConfig,
    clock: Clock,
    undo: ExitStack,
) -> dict[str, Any]:
    """Make a pruned model ready to be saved; what its report says of the whole of it."""
    with clock("layout"):
        layout = choose_layout(model, config.layout, inputs=send_to_device(calibration.probe, input_device(model)))
        undo.callback(layout.undo)
    with clock("evaluation"):
        after = count(model, calibration.held_out[0])
        change = drift(model, calibration.own_held_out, reference, shared=True)
    return {
        "model": getattr(model, "name_or_path", "") or "",
        "architecture": type(model).__name__,
        "config": config.to_dict(),
        "layout": layout.kind,
        "layout_reason": layout.reason,
        "parameters": Change(before.parameters, after.parameters),
        "macs": Change(before.macs, after.macs),
        "latency": latency,
        "measured_on": {} if latency is None else circumstances(model, calibration.held_out[0]),
        "drift": change.to_dict(),
        "data": calibration.description,
        "seconds": clock.seconds,
        "peak_memory": peak_memory(),
        "versions": {name: version(name) for name in ("hf_subprune", "torch", "transformers")},
    }


def _prune_experts_first(
    model: PreTrainedModel,
    data: Any,
    config: PruneConfig,
    processing_class: Any,
    evaluation: Callable[[PreTrainedModel], float] | None,
) -> PruneReport:
    """`prune` where whole experts go: they go first, then the model without them is pruned."""
    fraction, rest = without_experts(config)
    with session(model, whole=True), ExitStack() as undo:
        clock, calibration = _prepared(model, data, config, processing_class)
        with clock("evaluation"):
            reference = model_outputs(model, calibration.own_held_out)
            before = count(model, calibration.held_out[0])
            seconds = measure_latency(model, calibration.held_out[0])
        removed, refusals = remove_experts(model, calibration, config, fraction, clock, undo)
        if rest is None:
            latency = Change(seconds, measure_latency(model, calibration.held_out[0]))
            outcome = _outcome(model, calibration, before, latency, reference, config, clock, undo)
            report = PruneReport(blocks=removed, refusals=refusals, **outcome)
        else:
            with apart(model):
                calibrated = Calibrated(model, calibration, [rest], evaluation, clock=clock)
                calibrated.before, calibrated.reference = before, reference
                report = prune_to(calibrated, rest, undo)
            report = replace(
                report,
                config=config.to_dict(),
                latency=Change(seconds, measure_latency(model, calibration.held_out[0])),
                blocks=(*removed, *report.blocks),
                refusals=(*refusals, *report.refusals),
            )
        undo.pop_all()
    return from_process(0, report)


def _choose_together(
    calibrated: Calibrated, together: Sequence[tuple[Block, BlockMoments | None]], width: int, config: PruneConfig
) -> Chosen | None:
    """Select the units of tied blocks from the original model's moments of all, in the process that owns them."""
    if not is_mine(calibrated.owners[together[0][0].name]):
        return None
    return choose_together(
        [calibrated.problem(block, moments) for block, moments in together if moments is not None],
        width,
        shrinkage=config.shrinkage,
        importance=config.importance,
        method=config.method,
        swaps=None if config.swaps < 0 else config.swaps,
        generator=torch.Generator().manual_seed(config.seed),
    )


def _solve(
    calibrated: Calibrated,
    block: Block,
    moments: BlockMoments | None,
    width: int,
    config: PruneConfig,
    chosen: Chosen | None = None,
) -> Solution:
    """Select (unless units were chosen for all blocks of a tie) and reweight one block."""
    if moments is None:
        raise FileNotFoundError(f"The solution of {block.name}, which was finished, is gone: start the run anew.")
    start = time.perf_counter()
    consumer: Any = calibrated.model.get_submodule(block.consumer)
    try:
        solution, error = _solution(calibrated, block, moments, width, config, chosen)
    except RuntimeError as failure:
        if moments.device.type == "cpu" or not should_reduce_batch_size(failure):
            raise
        logger.warning(f"Block {block.name} is solved on the CPU: its moments leave no room on {moments.device}.")
        clear_device_cache(garbage_collection=True)
        solution, error = _solution(calibrated, block, moments.to("cpu"), width, config, chosen)
    bias = None if consumer.bias is None else consumer.bias.detach() + solution.bias_shift.to(consumer.bias)
    report = BlockReport(
        name=block.name,
        kind=block.kind,
        stack=block.stack,
        consumer=block.consumer,
        units_before=block.units,
        units_after=width,
        kept_units=tuple(solution.kept_units.tolist()),
        kept_columns=tuple(solution.kept_columns.tolist()),
        fitted_error=solution.fitted_error,
        held_out_error=error,
        shrinkage=solution.shrinkage if config.reweight else None,
        method=solution.method if block.sets == 1 else f"{solution.method}, query heads",
        guarantee=solution.guarantee,
        seconds=time.perf_counter() - start,
        **calibrated.predictions(block),
    )
    V = solution.V.to(consumer.weight.dtype)
    return report, solution.kept_units.cpu(), V.cpu(), None if bias is None else bias.cpu()


def _solution(
    calibrated: Calibrated,
    block: Block,
    moments: BlockMoments,
    width: int,
    config: PruneConfig,
    chosen: Chosen | None,
) -> tuple[BlockSolution, float]:
    """The solution of one block, where its moments are, and its error on the held-out rows, if any reached it."""
    # Where a solution that finds no room is tried again elsewhere, the sums are read once more.
    problem = calibrated.problem(block, moments, last=calibrated.stored is None and moments.device.type == "cpu")
    W = problem.W
    solution = solve_block(
        problem.folds,
        None,
        problem.W,
        problem.groups,
        width,
        sets=problem.sets,
        shrinkage=config.shrinkage,
        importance=config.importance,
        method=config.method,
        swaps=None if config.swaps < 0 else config.swaps,
        reweight_kept=config.reweight,
        output_metric=problem.output_metric,
        gradient=problem.gradient,
        generator=torch.Generator().manual_seed(config.seed),
        chosen=chosen,
    )
    del problem  # its moments are as large as the held-out ones may be
    held_out = moments.held_out_error(W, solution.kept_columns, solution.V, solution.bias_shift)
    return solution, solution.fitted_error if held_out is None else held_out


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
