"""What a pruned model has come to: proved, made ready to be saved, and measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version

import torch
from accelerate.utils import send_to_device

from ..allocation.choice import Widths
from ..allocation.survey import Survey
from ..config import PruneConfig
from ..data.batches import Samples
from ..evaluation.continuations import continued, side_by_side
from ..evaluation.costs import InTurn, circumstances, count
from ..evaluation.drift import Drift, drift
from ..evaluation.original import Original
from ..evaluation.outputs import Outputs, model_outputs
from ..models.forms import put_together
from ..models.running import Batch, input_device
from ..report.records import BlockReport, Change
from ..report.report import PruneReport
from ..runs.memory import peak_memory, release_memory
from ..runs.processes import from_process
from ..runs.stages import CHECKING, MEASURING, begin
from ..runs.workspace import Workspace
from ..storage.layout import choose_layout
from ..surgery.edits import taken_back
from ..surgery.verification import verify
from .loop import Solved
from .norms import renew_statistics


def outcome(
    survey: Survey, widths: Widths, solved: Solved, work: Workspace, drifted: Drift | None = None
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
        verify(survey.model, widths.blocks, kept, _short_probe(survey.samples))
        release_memory()  # a second set of new weights
    begin(MEASURING)
    with work.clock("evaluation"):
        timed = survey.latency(solved.edits, sum(work.clock.seconds.values()))
        reference = _reference(survey, solved) if drifted is None else ()
    work.undo.callback(put_together(survey.model.modules()))
    renewed = 0
    if drifted is None and any(block.kind == "channels" for block in widths.blocks):
        with work.clock("evaluation"):
            drifted, renewed = renew_statistics(survey.samples, reference, work)
    report = of_the_whole(survey.samples, survey.original, reference, widths.config, work, timed, drifted)
    blocks = (solved.reports.get(b.name) or BlockReport.whole(b, **survey.predictions(b)) for b in survey.blocks)
    report = replace(
        report,
        blocks=tuple(blocks),
        refusals=survey.found.refusals,
        allocation=widths.allocation(survey, widths.reached(survey, report.latency)),
        renewed_norms=renewed,
        continuations=side_by_side(
            survey.samples.tokenizer, survey.begun, survey.continued, continued(survey.model, survey.begun)
        ),
    )
    return from_process(0, report)


def _reference(survey: Survey, solved: Solved) -> Sequence[Outputs]:
    """What the original puts out on samples held out: edits are taken back, and no more of it runs than must."""
    if survey.reference is not None:
        return survey.reference
    with taken_back(solved.edits):
        rest = None if solved.rest is None else solved.rest.of_batch
        outputs = model_outputs(survey.model, survey.samples.own_held_out, rest)
    release_memory()  # logits of the pruned model come next
    return outputs


def of_the_whole(
    samples: Samples,
    original: Original,
    reference: Sequence[Outputs],
    config: PruneConfig,
    work: Workspace,
    timed: InTurn | None = None,
    drifted: Drift | None = None,
) -> PruneReport:
    """Make a pruned model ready to be saved; what its report says of the whole of it, without blocks.

    Args:
        samples: What it is measured on; their model is the pruned one.
        original: To compare with.
        reference: What it puts out on samples held out, unless `drifted` is given.
        config: What was asked for.
        work: As for `outcome`.
        timed: Seconds of its forwards, and inside of the original's.
        drifted: Of its output, where that was measured before.
    """
    model = samples.model
    with work.clock("layout"):
        layout = choose_layout(model, config.layout, inputs=_short_probe(samples))
        work.undo.callback(layout.undo)
    with work.clock("evaluation"):
        after = count(model, original.measured_on)
        if drifted is None:
            drifted = drift(model, samples.own_held_out, reference, shared=True)
    intervals = dict(drifted.intervals)
    if timed is not None:
        least, most = timed.ratios
        intervals["latency_ratio"] = 1 / most, 1 / least
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
        latency=None if timed is None else Change(timed.inside, timed.outside),
        measured_on={} if timed is None else circumstances(model, original.measured_on),
        drift=drifted.to_dict(),
        intervals=intervals,
        data=samples.description,
        seconds=work.clock.seconds,
        peak_memory=peak_memory(),
        versions={name: version(name) for name in ("hf_subprune", "torch", "transformers")},
    )


def _short_probe(samples: Samples) -> Batch:
    return send_to_device(samples.short_probe, input_device(samples.model))
