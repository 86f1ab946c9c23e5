"""Compare a pruned model with the original on the same samples."""

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table
from transformers import PreTrainedModel

from ..config import PruneConfig
from ..data.batches import Samples, cut_to_logits
from ..data.probe import samples_in
from ..data.reading import batch_some
from ..data.trial import check_forward
from ..models.running import Batch
from ..report.records import Change
from ..report.tables import change_row, in_words
from ..runs.stages import COMPARING, SCORING_ORIGINAL, SCORING_PRUNED, TIMING, advance, begin, expect
from .costs import LATENCY_ROUNDS, circumstances, count_macs, count_parameters, measure_in_turn
from .drift import Drift, drift
from .outputs import Outputs, iter_outputs


@dataclass(frozen=True)
class Comparison:
    """Size, speed and output of a pruned model against the original.

    Args:
        parameters: Number of parameters.
        macs: Multiply-accumulates of one forward on one sample.
        latency: Median seconds of a forward on one batch.
        measured_on: What latency was measured on.
        drift: Of the pruned model's output from the original's.
    """

    parameters: Change
    macs: Change
    latency: Change
    measured_on: dict[str, Any]
    drift: Drift

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        return asdict(self)

    def table(self) -> Table:
        """Side by side, as a rich table."""
        table = Table(title="Pruned against original", title_justify="left")
        for name in ("", "original", "pruned", "ratio"):
            table.add_column(name, justify="right" if name else "left")
        table.add_row("parameters", *change_row(self.parameters, 1e6, "M"))
        table.add_row("MACs a sample", *change_row(self.macs, 1e9, "G"))
        table.add_row("latency", *change_row(self.latency, 1e-3, "ms"))
        for name, value in self.drift.to_dict().items():
            table.add_row(name.replace("_", " "), "", f"{value:.4g}", "")
        table.caption = f"Latency: {in_words(self.measured_on)}."
        table.caption_justify = "left"
        return table


def compare(
    original: PreTrainedModel, pruned: PreTrainedModel, data: Any, config: PruneConfig, processing_class: Any = None
) -> Comparison:
    """Run both models on `config.samples` samples, or all that there are; nothing is fitted.

    Args:
        original: Before pruning.
        pruned: After.
        data: As for `prune`.
        config: As for `data.reading.batch_some`.
        processing_class: As for `prune`.

    Raises:
        TypeError, ValueError: as `data.reading.batch_some`.
    """
    batches = batch_some(original, data, config, processing_class)
    start = time.perf_counter()
    check_forward(Samples.of(original, batches))
    _foretell(time.perf_counter() - start, batches, data)
    begin(TIMING)
    before, after = zip(*measure_in_turn([original, pruned], batches[0]), strict=True)
    begin(COMPARING, sum(len(cut_to_logits(original, batch)) for batch in batches))
    return Comparison(
        parameters=Change(count_parameters(original), count_parameters(pruned)),
        macs=Change(count_macs(original, batches[0]), count_macs(pruned, batches[0])),
        latency=Change(statistics.median(before), statistics.median(after)),
        measured_on=circumstances(pruned, batches[0]),
        drift=drift(pruned, batches, _counted(iter_outputs(original, batches))),
    )


def _counted(outputs: Iterator[Outputs]) -> Iterator[Outputs]:
    for one in outputs:
        yield one
        advance()


def _foretell(forward: float, batches: Sequence[Batch], data: Any) -> None:
    """Say how long what comes may take, of which all is forwards, from the seconds of one."""
    rows = len(data) if hasattr(data, "__len__") else sum(map(samples_in, batches))
    scored = forward * rows / samples_in(batches[0])
    expect(
        {
            TIMING: 2 * (LATENCY_ROUNDS + 1) * forward,
            COMPARING: 2 * (len(batches) + 1) * forward,
            SCORING_ORIGINAL: scored,
            SCORING_PRUNED: scored,
        }
    )
