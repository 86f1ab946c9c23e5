"""`prune` and `prune_sizes`: the five stages in their order.

samples = read(model, data, config, processing_class)      # batches for the model
survey = take_survey(samples, configs, evaluation, work)   # blocks, targets, what each block would lose
widths = choose(survey, config, work)                      # who keeps how much
solved = solve(survey, widths, work)                       # units and new weights, installed block by block
report = outcome(survey, widths, solved, work)             # proved, made ready to be saved, measured
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

from .allocation.choice import choose
from .allocation.survey import Survey
from .allocation.surveying import take_survey
from .config import TARGETS, PruneConfig
from .data.batches import FittingBatches, Samples
from .data.reading import read
from .data.trial import blamed_on_data, check_forward
from .evaluation.continuations import beginnings, continued, side_by_side
from .evaluation.costs import circumstances, measure_latency
from .evaluation.original import Original
from .evaluation.outputs import model_outputs
from .loading import carried, carry
from .models.forms import apart
from .models.intact import intact, remembered
from .models.precision import precise_products
from .models.running import inside, is_offloaded
from .models.session import check_prunable, session
from .models.wrappers import taken_out
from .report.records import Change
from .report.report import PruneReport
from .routing.removal import remove_experts, without_experts
from .runs.memory import reused
from .runs.processes import from_process
from .runs.progress import displays
from .runs.stages import EXPERTS, PRUNING, READING, SHRINKING, SURVEYING, begin, shown, with_experts
from .runs.workspace import Workspace
from .solving.loop import solve
from .solving.outcome import of_the_whole, outcome


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
            are held in the CPU's memory. Of a `SentenceTransformer` or a pipeline, the model inside is shrunk, and
            what makes its inputs is taken from there as well.
        data: `datasets.Dataset` or `IterableDataset`, pandas `DataFrame`, list of strings, list of images, or iterable
            of ready batches (dicts of tensors). See `data.reading.read`.
        config: What to keep and how, or a dict of the fields of `PruneConfig`; `PruneConfig()` when left out.
        processing_class: Tokenizer, image processor or processor, as in `Trainer`; not needed for ready batches.
        evaluation: Quality of a model, more is better, for budget `"equal_loss"` in the paper's labelled form. It is
            called twice for each block that is looked at, and once for the original.

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
    model, processing_class = taken_out(model, processing_class)
    check_prunable(model, offloaded=True)
    with shown(with_experts(PRUNING, config.units), displays):
        report = intact(model, lambda: _prune(model, data, config, processing_class, evaluation))
    carry(model, report)
    return report


def _prune(
    model: PreTrainedModel,
    data: Any,
    config: PruneConfig,
    processing_class: Any,
    evaluation: Callable[[PreTrainedModel], float] | None,
) -> PruneReport:
    whole = "experts" in config.units
    with session(model, whole=whole), reused():
        work = Workspace()
        begin(READING)
        with work.clock("data"):
            samples = read(model, data, config, processing_class)

        def attempt(some: Samples) -> PruneReport:
            own = work.again()
            if whole:
                return _without_experts(some, config, evaluation, own)
            return prune_to(take_survey(some, [config], evaluation, own), config, own)

        return FittingBatches(samples).run(attempt)


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
        model: The very same when the iterator is exhausted or closed. It may be dispatched, as for `prune`.
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
    model, processing_class = taken_out(model, processing_class)
    check_prunable(model, offloaded=True)
    if not isinstance(configs, Sequence):
        raise TypeError(f"`configs` must be a list of PruneConfig, one a size, not {type(configs).__name__}.")
    configs = [PruneConfig.of(config) for config in configs]
    _check_alike(configs)
    put_back = remembered(model)
    try:
        yield from _prune_sizes(model, data, configs, processing_class, evaluation)
    except BaseException:
        put_back()
        raise


def _prune_sizes(
    model: PreTrainedModel,
    data: Any,
    configs: Sequence[PruneConfig],
    processing_class: Any,
    evaluation: Callable[[PreTrainedModel], float] | None,
) -> Iterator[PruneReport]:
    with session(model, precise=False) as handed_over:
        work, parameters = Workspace(), list(model.parameters())
        with precise_products(parameters), reused(), shown(SURVEYING, displays):
            begin(READING)
            with work.clock("data"):
                samples = read(model, data, configs[0], processing_class)
            batches = FittingBatches(samples)
            survey = batches.run(lambda some: take_survey(some, configs, evaluation, work))
        for config in configs:
            own = work.again()

            def attempt(some: Samples, config: PruneConfig = config, own: Workspace = own) -> PruneReport:
                nonlocal survey
                if some is not survey.samples:  # they were halved
                    survey = take_survey(some, configs, evaluation, own)
                return prune_to(survey, config, own)

            with precise_products(parameters), reused(), shown(SHRINKING, displays):
                report = batches.run(attempt)
            with closing(own.undo), handed_over(), carried(model, report):
                yield report


def prune_to(survey: Survey, config: PruneConfig, work: Workspace) -> PruneReport:
    """Prune a model that was surveyed to the size of one of its configs.

    Args:
        survey: Whose model is shrunk in place.
        config: One of those that the survey was taken for.
        work: Its `undo` takes everything back; what fails is taken back at once.

    Raises:
        EquivalenceError: as `prune`.
    """
    with blamed_on_data(survey.samples), work.undone_on_failure():
        widths = choose(survey, config, work)
        survey = survey.of_blocks(widths.blocks)
        solved = solve(survey, widths, work)
        survey = survey.solved()  # what the solver read is let go of
        return outcome(survey, widths, solved, work)


def _without_experts(
    samples: Samples,
    config: PruneConfig,
    evaluation: Callable[[PreTrainedModel], float] | None,
    work: Workspace,
) -> PruneReport:
    """Whole experts go first, then the model without them is pruned."""
    model = samples.model
    begin(EXPERTS)
    fraction, rest = without_experts(config)
    with work.clock("evaluation"):
        check_forward(samples)
        original, reference = Original.of(samples), model_outputs(model, samples.own_held_out)
        before = _seconds(model, original)
    begun = beginnings(samples)
    goes_on = continued(model, begun)
    with work.undone_on_failure():
        removed, refusals = remove_experts(samples, config, fraction, work)
        if rest is None:
            report = of_the_whole(samples, original, reference, config, work)
        else:
            with apart(inside(model)):
                own = work.again()  # what is taken back of the rest is so while experts are apart
                survey = take_survey(samples, [rest], evaluation, own)
                survey = replace(survey, original=original, reference=reference, begun=None, continued=None)
                report = prune_to(survey, rest, own)
        after = _seconds(model, original)
    report = replace(
        report,
        config=config.to_dict(),
        latency=Change(before, after) if before and after else None,
        intervals={name: interval for name, interval in report.intervals.items() if name != "latency_ratio"},
        measured_on=circumstances(model, original.measured_on),
        blocks=(*removed, *report.blocks),
        refusals=(*refusals, *report.refusals),
        continuations=side_by_side(samples.tokenizer, begun, goes_on, continued(model, begun)),
    )
    return from_process(0, report)


def _seconds(model: PreTrainedModel, original: Original) -> float | None:
    """Of a forward; `None` where weights are read from elsewhere meanwhile."""
    return None if is_offloaded(model) else measure_latency(model, original.measured_on)


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
