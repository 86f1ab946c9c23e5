"""`prune`: the one place that joins the stages."""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from importlib.metadata import version
from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from .advance import plan
from .blocks import Block, Refusal
from .budgets import uniform_widths
from .calibration import CalibrationSet, prepare
from .collection import BlockMoments, collect, consumer_weight
from .config import PruneConfig
from .evaluation import count_macs, count_parameters, drift, measure_latency, model_outputs
from .layout import choose_layout
from .probe import discover
from .report import BlockReport, Change, PruneReport
from .reweighting import relative_error
from .solver import BlockSolution, solve_block
from .surgery import Edit, shrink
from .verification import verify

logger = logging.get_logger(__name__)


def prune(
    model: PreTrainedModel,
    data: Any,
    config: PruneConfig | None = None,
    processing_class: Any = None,
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
    clock = _Clock()
    with _eval_mode(model), _restored_on_failure() as undo:
        with clock("data"):
            calibration = prepare(model, data, config, processing_class)
        probe_batch = calibration.probe
        with clock("discovery"):
            found = discover(model, probe_batch)
            blocks = choose_blocks(found.blocks, found.refusals, config)
            widths = {b.name: w for b, w in zip(blocks, allocate(blocks, config), strict=True)}
            to_prune = [b for b in blocks if widths[b.name] < b.units]
            segments = plan(model, to_prune, probe_batch)
        if segments.unreached:
            names = ", ".join(b.name for b in segments.unreached)
            raise ValueError(
                f"The calibration data never reaches {names}: pass data that runs this part of the model, or leave it "
                f"whole with `exclude`."
            )
        with clock("evaluation"):
            reference = model_outputs(model, calibration.held_out)
            before = _measure(model, calibration)

        edits: dict[str, Edit] = {}
        undo.callback(lambda: _undo(edits))
        solutions: dict[str, BlockReport] = {}
        kept: dict[str, torch.Tensor] = {}
        with _progress(len(segments.segments), "Pruning") as bar:
            steps = collect(model, segments, calibration, config.variant, edits, bar.update)
            while True:
                with clock("calibration"):
                    step = next(steps, None)
                if step is None:
                    break
                block, moments = step
                with clock("selection"):
                    report, edits[block.name] = _prune_block(model, block, moments, widths[block.name], config)
                solutions[block.name] = report
                kept[block.name] = torch.tensor(report.kept_units)
                del step, moments

        with clock("verification"):
            with _taken_back(edits):
                verify(model, to_prune, kept, probe_batch)
        with clock("layout"):
            layout = choose_layout(model, config.layout, inputs=probe_batch)
            undo.callback(layout.undo)
        with clock("evaluation"):
            after = _measure(model, calibration)
            change = drift(model, calibration.held_out, reference)
        undo.pop_all()
    logger.info("Pruned %d blocks.", len(edits))
    return PruneReport(
        model=getattr(model, "name_or_path", "") or "",
        architecture=type(model).__name__,
        config=config.to_dict(),
        blocks=tuple(solutions.get(b.name) or _whole(b) for b in blocks),
        refusals=found.refusals,
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
        ValueError: a pattern matches nothing, or no block is left; the message lists what there is.
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
    if not chosen:
        there = ", ".join(f"{b.name} ({b.kind})" for b in blocks) or "none"
        why = "".join(f"\n  {r.name}: {r.reason} {r.advice}" for r in refusals)
        raise ValueError(
            f"No prunable block is left: units={list(config.units)}, include={list(config.include)}, "
            f"exclude={list(config.exclude)}; prunable blocks found: {there}.{why}"
        )
    return chosen


def allocate(blocks: Sequence[Block], config: PruneConfig) -> list[int]:
    """How many units each block keeps.

    Raises:
        ValueError: a block would be left without units; the message says the smallest fraction that works.
    """
    widths = []
    for block in blocks:
        fraction = config.keep.get(block.kind, 1.0) if isinstance(config.keep, dict) else config.keep
        multiple = config.round_to if block.kind == "mlp" and block.units >= config.round_to else 1
        (width,) = uniform_widths([block.units], fraction, multiple)
        if width == 0:
            raise ValueError(
                f"keep={fraction} would leave block {block.name} with none of its {block.units} {block.kind} units "
                f"(in multiples of {multiple}): keep at least {multiple / block.units:.4g}, or leave the block whole "
                f"with exclude={[block.name]!r}."
            )
        widths.append(width)
    return widths


def _prune_block(
    model: nn.Module, block: Block, moments: BlockMoments, width: int, config: PruneConfig
) -> tuple[BlockReport, Edit]:
    """Select, reweight and shrink one block."""
    start = time.perf_counter()
    consumer = model.get_submodule(block.consumer)
    W = consumer_weight(consumer)
    solution: BlockSolution = solve_block(
        [fold.moments(W) for fold in moments.folds if fold.rows],
        None,
        W,
        block.columns,
        width,
        shrinkage=config.shrinkage,
        importance=config.importance,
        method=config.method,
        swaps=None if config.swaps < 0 else config.swaps,
        reweight_kept=config.reweight,
        generator=torch.Generator().manual_seed(config.seed),
    )
    error = relative_error(moments.held_out.moments(W), solution.kept_columns, solution.V, solution.bias_shift)
    bias = None if consumer.bias is None else consumer.bias.detach() + solution.bias_shift.to(consumer.bias)
    edit = shrink(model, block, solution.kept_units, weight=solution.V, bias=bias)
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
    ), edit


def _whole(block: Block) -> BlockReport:
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
    )


def _undo(edits: dict[str, Edit]) -> None:
    for edit in reversed(edits.values()):
        edit.undo()


@contextmanager
def _taken_back(edits: dict[str, Edit]) -> Iterator[None]:
    """The original model for the time being."""
    _undo(edits)
    try:
        yield
    finally:
        for edit in edits.values():
            edit.redo()


def _measure(model: nn.Module, calibration: CalibrationSet) -> dict[str, Any]:
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
def _restored_on_failure() -> Iterator[ExitStack]:
    """Callbacks put on the stack run when the body fails; the body clears the stack when it is done."""
    with ExitStack() as stack:
        yield stack


@contextmanager
def _progress(total: int, description: str) -> Iterator[Any]:
    """A bar on the main process, on a terminal only; `transformers.utils.logging.disable_progress_bar` hides it."""
    hidden = None if PartialState().is_main_process else True
    with logging.tqdm(total=total, desc=description, disable=hidden) as bar:
        yield bar


class _Clock:
    """Wall time of named stages, added up."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


def _peak_memory() -> int:
    """Largest resident size of this process so far, bytes."""
    import resource  # POSIX only

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
