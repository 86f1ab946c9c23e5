"""What a pruned model has come to: proved, made ready to be saved, and measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version

import torch
from accelerate.utils import send_to_device

from ..allocation.choice import Widths
from ..allocation.survey import Survey
from ..config import PruneConfig
from ..data.batches import Samples
from ..evaluation.costs import circumstances, count
from ..evaluation.drift import drift
from ..evaluation.original import Original
from ..models.forms import put_together
from ..models.running import input_device
from ..report.records import BlockReport, Change
from ..report.report import PruneReport
from ..runs.memory import peak_memory
from ..runs.processes import from_process
from ..runs.stages import CHECKING, MEASURING, begin
from ..runs.workspace import Workspace
from ..storage.layout import choose_layout
from ..surgery.edits import taken_back
from ..surgery.verification import verify
from .loop import Solved
from .norms import renew_statistics


def outcome(
    survey: Survey, widths: Widths, solved: Solved, work: Workspace, drifted: Mapping[str, float] | None = None
) -> PruneReport:
    """The report of a model that has lost its units, after the proof that it computes what it should.

    Args:
        survey: Of the model before.
        widths: Of one of its sizes.
        solved: Edits that are in place.
        work: Its `undo` gets what takes back what is done here.
        drifted: Of the model's output, where that was measured before.

    Raises:
        EquivalenceError: the shrunk model is not the masked model.
        ValueError: the layout that was asked for cannot say the widths.
    """
    kept = {name: torch.tensor(report.kept_units, dtype=torch.long) for name, report in solved.reports.items()}
    begin(CHECKING)
    with work.clock("verification"), taken_back(solved.edits):
        verify(survey.model, widths.blocks, kept, survey.probe)
    begin(MEASURING)
    with work.clock("evaluation"):
        latency = survey.latency(solved.edits)
    work.undo.callback(put_together(survey.model.modules()))
    renewed = 0
    if drifted is None and any(block.kind == "channels" for block in widths.blocks):
        with work.clock("evaluation"):
            new, renewed = renew_statistics(survey.samples, survey.original, work)
            drifted = new.to_dict()
    report = of_the_whole(survey.samples, survey.original, latency, widths.config, work, drifted)
    blocks = (solved.reports.get(b.name) or BlockReport.whole(b, **survey.predictions(b)) for b in survey.blocks)
    report = replace(
        report,
        blocks=tuple(blocks),
        refusals=survey.found.refusals,
        allocation=widths.allocation(survey, widths.reached(survey, latency)),
        renewed_norms=renewed,
    )
    return from_process(0, report)


def of_the_whole(
    samples: Samples,
    original: Original,
    latency: Change | None,
    config: PruneConfig,
    work: Workspace,
    drifted: Mapping[str, float] | None = None,
) -> PruneReport:
    """Make a pruned model ready to be saved; what its report says of the whole of it, without blocks.

    Args:
        samples: What it is measured on; their model is the pruned one.
        original: To compare with.
        latency: Seconds before and after.
        config: What was asked for.
        work: As for `outcome`, and so is `drifted`.
    """
    model = samples.model
    with work.clock("layout"):
        layout = choose_layout(model, config.layout, inputs=send_to_device(samples.probe, input_device(model)))
        work.undo.callback(layout.undo)
    with work.clock("evaluation"):
        after = count(model, samples.held_out[0])
        if drifted is None:
            drifted = drift(model, samples.own_held_out, original.outputs, shared=True).to_dict()
    return PruneReport(
        model=getattr(model, "name_or_path", "") or "",
        architecture=type(model).__name__,
        config=config.to_dict(),
        blocks=(),
        refusals=(),
        layout=layout.kind,
        layout_reason=layout.reason,
        parameters=Change(original.costs.parameters, after.parameters),
        macs=Change(original.costs.macs, after.macs),
        latency=latency,
        measured_on={} if latency is None else circumstances(model, samples.held_out[0]),
        drift=dict(drifted),
        data=samples.description,
        seconds=work.clock.seconds,
        peak_memory=peak_memory(),
        versions={name: version(name) for name in ("hf_subprune", "torch", "transformers")},
    )
