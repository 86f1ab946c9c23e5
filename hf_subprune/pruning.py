"""`prune` and `prune_sizes`: the five stages in their order.

    samples = read(model, data, config, processing_class)         # batches for the model
    survey = take_survey(model, samples, configs, ..., work)      # blocks, targets, what each block would lose
    widths = choose(survey, config, work)                         # who keeps how much
    solved = solve(survey, widths, work)                          # units and new weights, installed block by block
    report = outcome(survey, widths, solved, work)                # proved, made ready to be saved, measured
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
from .data.batches import Samples, with_fitting_batches
from .data.reading import read
from .evaluation.original import Original
from .models.forms import apart
from .models.session import check_prunable, session
from .report.records import Change
from .report.report import PruneReport
from .routing.removal import remove_experts, without_experts
from .runs.processes import from_process
from .runs.workspace import Workspace
from .solving.loop import solve
from .solving.outcome import of_the_whole, outcome
from .solving.latency import seconds_of

Evaluation = Callable[[PreTrainedModel], float]


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
            of ready batches (dicts of tensors). See `data.reading.read`.
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
    check_prunable(model, offloaded=True)
    whole = "experts" in config.units
    with session(model, whole=whole):
        work = Workspace()
        with work.clock("data"):
            samples = read(model, data, config, processing_class)

        def attempt(some: Samples, _size: int) -> PruneReport:
            own = work.again()
            if whole:
                return _without_experts(model, some, config, evaluation, own)
            return prune_to(take_survey(model, some, [config], evaluation, own), config, own)

        return with_fitting_batches(samples, attempt)


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
    check_prunable(model, offloaded=True)
    if not isinstance(configs, Sequence):
        raise TypeError(f"`configs` must be a list of PruneConfig, one a size, not {type(configs).__name__}.")
    configs = [PruneConfig.of(config) for config in configs]
    _check_alike(configs)
    with session(model) as held:
        work = Workspace()
        with work.clock("data"):
            samples = read(model, data, configs[0], processing_class)
        surveyed: dict[int, Survey] = {}  # of the latest size of batches

        def survey(some: Samples, size: int) -> Survey:
            if size not in surveyed:
                surveyed.clear()
                surveyed[size] = take_survey(model, some, configs, evaluation, work)
            return surveyed[size]

        with_fitting_batches(samples, survey)
        for config in configs:
            own = work.again()
            report = with_fitting_batches(
                samples, lambda some, size: prune_to(survey(some, size), config, own)
            )
            with closing(own.undo), held.handed_over():
                yield report
