"""Take the survey of a model: find its blocks, cost the targets, measure what its output is sensitive to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from accelerate.utils import send_to_device
from transformers import PreTrainedModel
from transformers.utils import logging

from ..blocks import Block, Discovery, choose_blocks, groups_of, removed_blocks, some_of
from ..collection.block_moments import FOLDS, dtype_of_sums
from ..collection.planning import plan
from ..collection.segments import Plan
from ..collection.sensitivity import Means, activation_gradients, entries_at_once, output_metrics
from ..config import PruneConfig
from ..data.batches import Samples
from ..data.trial import blamed_on_data
from ..discovery.discover import discover
from ..evaluation.continuations import beginnings, continued
from ..evaluation.original import Original
from ..models.forms import together
from ..models.linears import matrix_shape
from ..models.running import Batch, input_device, inside, is_offloaded
from ..runs.memory import release_memory
from ..runs.processes import from_process, processes
from ..runs.stages import FINDING, ORIGINAL, begin
from ..runs.store import Store
from ..runs.workspace import Workspace
from ..storage.layout import choose_layout
from .families import Families, even_families, narrow_width, prove_stock
from .foresight import bytes_of_states, foretell, foretell_roughly, rows_an_entry
from .losses import with_losses
from .propagation import Quality
from .survey import Survey
from .targets import Target, resolve
from .widths import check_target

logger = logging.get_logger(__name__)

Found = tuple[Discovery, list[Block], list[Target], list[Families], list[Block], Plan]
"""What `find` returns: all blocks, those of the config, targets, how blocks are tied, who may shrink, segments."""

# Bytes of activations that a backward holds at most, by a rough estimate; beyond that, segments run once more in it.
_GRAPH_BYTES = 128 * 2**20
# What a layer keeps of each row for its backward, in multiples of what its consumers read.
_KEPT = 5


def take_survey(
    samples: Samples,
    configs: Sequence[PruneConfig],
    evaluation: Callable[[PreTrainedModel], float] | None,
    work: Workspace,
) -> Survey:
    """All that is known of a model before units are removed from it.

    Args:
        samples: The batches, and their model in a `session`, which is left as it is.
        configs: The sizes; they differ in size, budget, layout and rounding only.
        evaluation: As for `prune`.
        work: What is found is kept there, and read again when a run that was stopped is started again with the same
            model, data and config.

    Raises:
        ValueError: no block can be pruned, or a target cannot be reached; whole experts are asked for; `evaluation`
            is read by no budget, or does not return a finite number.
    """
    first = configs[0]
    if "experts" in first.units:
        raise ValueError("Whole experts are removed by `prune`, to one size, not in training: leave them out.")
    if evaluation is not None and not any(c.allocation() == "equal_loss" for c in configs):
        raise ValueError("`evaluation` is read by budget='equal_loss' only: choose that budget, or leave it out.")
    quality = None if evaluation is None else Quality(evaluation, samples.model)
    probe = send_to_device(samples.probe, input_device(samples.model))
    with blamed_on_data(samples):
        # In one file: a block is one object everywhere.
        found, blocks, targets, families, candidates, segments = work.once(
            "blocks", lambda: find(samples, configs, probe, work)
        )
        needs_curves = leave_a_choice(configs, families, candidates)
        foretell(samples, candidates, first, needs_curves)
        needs_metrics = bool(candidates) and first.reads_sensitivities(needs_curves)
        needed = partial(_scratch_bytes, samples, candidates, first, metrics=needs_metrics)
        work.check_space(needed, "what the run keeps of each layer")
        begin(ORIGINAL)
        with work.clock("evaluation"):
            whole = any(config.target() in ("latency", "macs") for config in configs)
            original = work.once("original", lambda: Original.of(samples, whole=whole))
        begun = beginnings(samples)
        survey = Survey(
            samples=samples,
            configs=list(configs),
            probe=probe,
            found=found,
            blocks=blocks,
            candidates=candidates,
            targets=targets,
            families=families,
            plan=segments,
            owners=_owners(blocks, needs_curves),
            original=original,
            begun=begun,
            continued=continued(samples.model, begun),
        )
        with work.clock("sensitivity"):
            needs_gradients = bool(candidates) and first.importance == "activation_gradient"
            survey = _with_sensitivities(survey, needs_metrics, needs_gradients, work)
        grouped = any(b.queries is not None for b in candidates)  # these are looked at before they are pruned
        shared = first.streams() == "layer" and (needs_curves or len(configs) > 1 or grouped)
        keep = shared and work.holds(sum(_moment_bytes(samples, block) for block in candidates))
        if needs_curves or keep:
            survey = with_losses(survey, quality, work, curves=needs_curves, keep=keep)
        release_memory()
    return survey


def leave_a_choice(configs: Sequence[PruneConfig], families: Sequence[Families], candidates: Sequence[Block]) -> bool:
    """Whether a budget shares out by what blocks lose, and says less than every width."""
    return any(
        config.allocation() != "uniform" and tied.leave_a_choice(candidates)
        for config, tied in zip(configs, families, strict=True)
        if candidates
    )


def looked_at_again(survey: Survey) -> Survey:
    """The survey with those sensitivities that solving reads, of the model as it is now."""
    first = survey.configs[0]
    return replace(
        survey,
        metrics=_sensitivities(survey, Store()) if first.reads_sensitivities(curves=False) else Means(),
        gradients=_activation_gradients(survey) if first.importance == "activation_gradient" else {},
    )


def find(samples: Samples, configs: Sequence[PruneConfig], probe: Batch, work: Workspace) -> Found:
    """What can be pruned of a model, how small it is to be, and in which order its parts run.

    Args:
        samples, configs, work: As for `take_survey`.
        probe: Of the samples, on the model's device.

    Raises:
        ValueError: as `take_survey`; the data does not fit the model, or what is pruned could not be saved.
    """
    model = samples.model
    with work.clock("discovery"):
        foretell_roughly(samples, configs[0])
        begin(FINDING)
        if not is_offloaded(model):  # else this would read all of it, twice
            with together(inside(model)):  # what could not be saved is refused now rather than after the work
                choose_layout(model, inputs=send_to_device(samples.short_probe, input_device(model))).undo()
        found = discover(model, probe)
        blocks = choose_blocks(found.blocks, found.refusals, configs[0])
    with work.clock("targets"):
        targets = from_process(0, resolve(samples, blocks, configs))  # latencies differ from process to process
        families = _families(model, blocks, targets, configs, probe)
    sizes = list(zip(targets, families, strict=True))
    candidates = [b for b in blocks if any(_may_shrink(b, target, tied) for target, tied in sizes)]
    with work.clock("discovery"):
        segments = plan(samples, candidates)
    return found, blocks, targets, families, candidates, segments


def _families(
    model: PreTrainedModel,
    blocks: Sequence[Block],
    targets: Sequence[Target],
    configs: Sequence[PruneConfig],
    probe: Batch,
) -> list[Families]:
    """How blocks are tied for each size: evenly where the config of the model can say what the size asks for.

    Raises:
        ValueError: a target cannot be met, or, for layout `"stock"`, not with widths that the config says.
    """
    gone = removed_blocks(blocks, configs[0])
    single = Families.single(blocks).without(gone)
    if any(config.is_even() for config in configs):
        even = even_families(model, blocks).without(gone)
    found = []
    for config, target in zip(configs, targets, strict=True):
        chosen = even if config.is_even() else single
        try:
            widths = check_target(blocks, target, config, chosen)
        except ValueError:
            if chosen is single:
                raise
            left = [block for block in blocks if block.name in even.whole]
            if config.layout == "stock":
                prove_stock(model, left, {block.name: narrow_width(block) for block in left}, probe)
                raise
            chosen = single
            widths = check_target(blocks, target, config, chosen)
        if config.layout == "stock" and chosen is single and not gone:  # refused now rather than after the work
            prove_stock(model, blocks, widths, probe)
        found.append(chosen)
    return found


def _may_shrink(block: Block, target: Target, families: Families) -> bool:
    """Whether a target can take units from a block."""
    if block.name in families.gone | families.whole:
        return block.name in families.gone
    return any(
        block.name in part.blocks and part.limit < sum(target.costs[name][-1] for name in part.blocks)
        for part in target.parts
    )


def _owners(blocks: Sequence[Block], curves: bool) -> dict[str, int]:
    """Processes take turns; what a curve or a selection needs of several blocks goes to one of them."""
    groups = groups_of(blocks)
    turns = [group.blocks for group in groups] if curves else [some for group in groups for some in group.choices]
    return {block.name: turn % processes() for turn, some in enumerate(turns) for block in some}


def _scratch_bytes(samples: Samples, candidates: Sequence[Block], config: PruneConfig, *, metrics: bool) -> int:
    """At most: states of the samples, sensitivities where there are any, new weights."""
    shapes = [matrix_shape(samples.model.get_submodule(block.consumer)) for block in candidates]
    itemsize, known = samples.model.dtype.itemsize, 8 * metrics
    return bytes_of_states(samples, candidates, config) + sum(known * m * m + 2 * n * m * itemsize for n, m in shapes)


def _moment_bytes(samples: Samples, block: Block) -> int:
    n, _ = matrix_shape(samples.model.get_submodule(block.consumer))
    return (FOLDS + 1) * n * n * dtype_of_sums(n).itemsize


def _with_sensitivities(survey: Survey, metrics: bool, gradients: bool, work: Workspace) -> Survey:
    changes: dict[str, Any] = {}
    if metrics:
        store = work.store("sensitivities")
        changes["metrics"] = Means(work.once("sensitivities", lambda: _sensitivities(survey, store).parts), store)
    if gradients:
        changes["gradients"] = work.once("gradients", lambda: _activation_gradients(survey))
    return replace(survey, **changes)


def _sensitivities(survey: Survey, store: Store) -> Means:
    metrics = output_metrics(
        survey.samples,
        survey.candidates,
        seed=survey.configs[0].seed,
        recomputed=_recomputed(survey),
        store=store,
    )
    silent = [name for name, M in metrics.items() if not float(M.diagonal().sum()) > 0]
    if silent:
        logger.warning(f"The model's output does not depend on {some_of(silent)}: all errors count alike there.")
    return metrics.without(silent)


def _activation_gradients(survey: Survey) -> Mapping[str, Any]:
    return activation_gradients(
        survey.samples, survey.candidates, seed=survey.configs[0].seed, recomputed=_recomputed(survey)
    )


def _recomputed(survey: Survey) -> list[str]:
    """Modules that a backward runs once more, so that it holds neither offloaded weights nor a large graph.

    As few of them as leave the rest a graph of `_GRAPH_BYTES`.
    """
    paths = [segment.path for segment in survey.plan.segments if segment.path]
    if is_offloaded(survey.model):
        return paths
    rows, held = rows_an_entry(survey.samples, [block.consumer for block in survey.candidates]), 0.0
    for path, count in rows.items():
        consumer: Any = survey.model.get_submodule(path)
        held += _KEPT * count * matrix_shape(consumer)[0] * consumer.weight.element_size()
    return paths[int(len(paths) * _GRAPH_BYTES / max(held * entries_at_once(survey.samples), 1)) :]
