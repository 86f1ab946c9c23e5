"""Compare a pruned model with the original on the same samples."""

import statistics
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table
from transformers import PreTrainedModel

from ..config import PruneConfig
from ..data.batches import Samples
from ..data.reading import batch_some
from ..data.trial import check_forward
from ..report.records import Change
from ..report.tables import change_row, in_words
from .costs import circumstances, count_macs, count_parameters, measure_in_turn
from .drift import Drift, drift, iter_outputs


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
        config: Its `samples`, `max_length`, `batch_size` and `seed` are used.
        processing_class: As for `prune`.

    Raises:
        TypeError, ValueError: as `calibration.batch_some`.
    """
    batches = batch_some(original, data, config, processing_class)
    check_forward(Samples.of(original, batches))
    before, after = zip(*measure_in_turn([original, pruned], batches[0]), strict=True)
    return Comparison(
        parameters=Change(count_parameters(original), count_parameters(pruned)),
        macs=Change(count_macs(original, batches[0]), count_macs(pruned, batches[0])),
        latency=Change(statistics.median(before), statistics.median(after)),
        measured_on=circumstances(pruned, batches[0]),
        drift=drift(pruned, batches, iter_outputs(original, batches)),
    )
