"""What a pruning run did and what it measured: dataclasses, their JSON, and the names of files."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from ..blocks import Block, Refusal

REPORT_NAME = "subprune_report.json"
PAGE_NAME = "subprune_report.md"
HTML_NAME = "report.html"
PLOT_FOLDER = "plots"
PLOTS = {
    "Parameters, MACs and latency before and after": "cost.png",
    "Units kept in each block": "kept.png",
    "Relative error of each block": "error.png",
    "Relative error against units kept": "curves.png",
}
"""File name of each plot of one report, per title, in the order to show them."""

FORMAT = 1

AnyRecord = TypeVar("AnyRecord", bound="Record")


@dataclass(frozen=True)
class BlockReport:
    """One block before and after.

    Args:
        name: Of the block, as in `hf-subprune inspect`.
        kind: `"mlp"`, `"attention"` or `"channels"`.
        consumer: Dotted path of the module that reads the units and got new weights.
        units_before: Number of units before.
        units_after: Number of units after.
        kept_units: Indices into the original units, sorted.
        kept_columns: Indices into the original consumer's input columns, sorted.
        fitted_error: Relative error `||A W - B_S V||^2 / ||A W||^2` of the consumer's output on the rows fitted on.
        held_out_error: The same on rows that were never fitted on (an expert that gets none: on those fitted on).
        shrinkage: The strength of the pull towards the original weights that was used (dimensionless); `None` when
            nothing was reweighted.
        method: How the units were selected.
        guarantee: Lower bound on the captured fraction of what the best choice of this size could capture, in [0, 1];
            `None` when none was computed.
        seconds: Wall time of selection and reweighting.
        curve: `(units kept, fitted error, held-out error)` of nested greedy sets, as the two errors above but with the
            held-out one cross-fitted; a few points from few units to many, empty when the budget needed none.
        predicted: `(units kept, drift)` of the model's output that the budget expected of pruning this block alone,
            from few units to all; empty when the budget needed none.
        stack: Dotted path of the module that stores the block together with the other experts of its layer; `None`
            for a block on its own.
    """

    name: str
    kind: str
    consumer: str
    units_before: int
    units_after: int
    kept_units: tuple[int, ...]
    kept_columns: tuple[int, ...]
    fitted_error: float
    held_out_error: float
    shrinkage: float | None
    method: str
    guarantee: float | None
    seconds: float
    curve: tuple[tuple[int, float, float], ...] = ()
    predicted: tuple[tuple[int, float], ...] = ()
    stack: str | None = None

    @classmethod
    def whole(
        cls,
        block: Block,
        curve: tuple[tuple[int, float, float], ...] = (),
        predicted: tuple[tuple[int, float], ...] = (),
    ) -> "BlockReport":
        """Of a block that keeps every unit; `curve` and `predicted` are as above."""
        return cls(
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
            curve=curve,
            predicted=predicted,
            stack=block.stack,
        )


@dataclass(frozen=True)
class Change:
    """A figure of the whole model before and after pruning."""

    before: float
    after: float

    @property
    def ratio(self) -> float:
        """`after / before`."""
        return self.after / self.before


@dataclass(frozen=True)
class Allocation:
    """How big the model was to be, and how that was shared out.

    Args:
        budget: `"global"`, `"equal_loss"` or `"uniform"`.
        target: `"keep"`, `"params"`, `"macs"`, `"latency"` or `"size"`.
        unit: Of the figures below, in words.
        limit: What was asked for.
        reached: What it came to: counted, or for latency measured.
        predicted_drift: Sum of the blocks' predicted drifts; `None` when none were predicted.
        latencies: What was timed for a latency target: rows of kind, width, number of blocks narrowed, seconds.
        alternatives: Where layers share their widths, other ways to share out, by the heads that they keep: rows of
            the widths in words, and the predicted drift. What was chosen is first, then what loses least.
    """

    budget: str
    target: str
    unit: str
    limit: float
    reached: float
    predicted_drift: float | None = None
    latencies: tuple[tuple[str, int, int, float], ...] = ()
    alternatives: tuple[tuple[str, float], ...] = ()


Example = tuple[str, str, str]
"""What is right for a sample of a task, what the original predicts, and what the pruned model does."""


@dataclass(frozen=True)
class TaskMetric:
    """A labelled metric of the whole model before and after pruning.

    Args:
        name: As in `evaluate`, e.g. `"accuracy"`, `"perplexity"`, `"spearmanr"`.
        task: Of the Hub, e.g. `"text-classification"`.
        dataset: Hub id or name of the data.
        split: Of the data.
        samples: Number of samples it was computed on.
        value: Before and after.
        before_interval: 95% confidence interval of the value before, `(low, high)`.
        after_interval: The same of the value after.
        change_interval: The same of the difference, after minus before, on the same samples.
        examples: The first samples, of a task whose predictions can be read.
    """

    name: str
    task: str
    dataset: str
    split: str
    samples: int
    value: Change
    before_interval: tuple[float, float] | None = None
    after_interval: tuple[float, float] | None = None
    change_interval: tuple[float, float] | None = None
    examples: tuple[Example, ...] = ()

    @property
    def data(self) -> str:
        """Name of the data set and its split."""
        return f"{self.dataset} {self.split}".rstrip()

    def cells(self) -> tuple[str, str, str]:
        """Before, after and change, each with its interval, as cells of a table."""
        figures = (
            (f"{self.value.before:.4g}", self.before_interval),
            (f"{self.value.after:.4g}", self.after_interval),
            (f"{self.value.after - self.value.before:+.4g}", self.change_interval),
        )
        before, after, change = (
            figure if interval is None else f"{figure} [{interval[0]:.4g}, {interval[1]:.4g}]"
            for figure, interval in figures
        )
        return before, after, change


@dataclass(frozen=True)
class Continuation:
    """How a text goes on.

    Args:
        prompt: How it begins.
        before: How the original model goes on.
        after: How the pruned one does.
    """

    prompt: str
    before: str
    after: str


@dataclass(frozen=True)
class Record:
    """The figures of a `PruneReport`, which says what each of them is, and their JSON."""

    model: str
    architecture: str
    config: dict[str, Any]
    blocks: tuple[BlockReport, ...]
    refusals: tuple[Refusal, ...]
    layout: str
    layout_reason: str
    parameters: Change
    macs: Change
    latency: Change | None
    measured_on: dict[str, Any]
    drift: dict[str, float]
    data: dict[str, Any]
    seconds: dict[str, float]
    peak_memory: int
    versions: dict[str, str] = field(default_factory=dict)
    metrics: tuple[TaskMetric, ...] = ()
    command: str = ""
    allocation: Allocation | None = None
    renewed_norms: int = 0
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    continuations: tuple[Continuation, ...] = ()

    @property
    def drift_figures(self) -> dict[str, float]:
        """`drift` without the number of rows that it was measured on."""
        return {name: value for name, value in self.drift.items() if name != "rows"}

    def with_metrics(self: AnyRecord, metrics: Sequence[TaskMetric]) -> AnyRecord:
        """This report with further metrics; they replace those of the same name on the same data."""
        new = {(metric.name, metric.data) for metric in metrics}
        return replace(self, metrics=(*(m for m in self.metrics if (m.name, m.data) not in new), *metrics))

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_dict(cls: type[AnyRecord], values: dict[str, Any]) -> AnyRecord:
        """The inverse of `to_dict`.

        Raises:
            ValueError: the format is another one, or fields are missing or unknown.
        """
        values = dict(values)
        found = values.pop("format", None)
        if found != FORMAT:
            raise ValueError(
                f"A report of format {FORMAT} is expected, found format {found!r}: was it written by another version?"
            )
        known = {f.name for f in fields(cls)}
        required = {f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING}
        if not required <= set(values) <= known:
            missing, unknown = sorted(required - set(values)), sorted(set(values) - known)
            raise ValueError(f"Not a pruning report: missing fields {missing}, unknown fields {unknown}.")
        try:
            values["blocks"] = tuple(BlockReport(**_tuples(block)) for block in values["blocks"])
            values["refusals"] = tuple(Refusal(**r) for r in values["refusals"])
            values["metrics"] = tuple(
                TaskMetric(**_tuples({**metric, "value": Change(**metric["value"])}))
                for metric in values.get("metrics", ())
            )
            for name in ("parameters", "macs", "latency"):
                values[name] = values[name] and Change(**values[name])
            values["intervals"] = {name: tuple(ends) for name, ends in values.get("intervals", {}).items()}
            values["continuations"] = tuple(Continuation(**one) for one in values.get("continuations", ()))
            if values.get("allocation"):
                values["allocation"] = Allocation(**_tuples(values["allocation"]))
        except (TypeError, KeyError) as error:
            raise ValueError(f"Not a pruning report: {error}.") from error
        return cls(**values)

    @classmethod
    def load(cls: type[AnyRecord], path: str | Path) -> AnyRecord:
        """Read a report from its file or from the folder that holds it.

        Raises:
            FileNotFoundError: there is none.
            ValueError: the file is not a report; the message says what is wrong with it.
        """
        path = Path(path)
        if path.is_dir():
            path = path / REPORT_NAME
        if not path.is_file():
            raise FileNotFoundError(
                f"No pruning report at {path}: give a folder that holds {REPORT_NAME}, as `prune` writes it."
            )
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, AttributeError, TypeError) as error:
            raise ValueError(f"{path} cannot be read as a pruning report: {error}") from error


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """Lists, nested ones too, as tuples, which JSON cannot hold."""

    def convert(value: Any) -> Any:
        return tuple(map(convert, value)) if isinstance(value, (list, tuple)) else value

    return {name: convert(value) for name, value in values.items()}
