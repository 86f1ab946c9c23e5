"""What a pruning run did and what it measured: dataclasses, JSON, and a page to read."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .blocks import Block, Refusal
from .tables import block_table, markdown_table, refusal_table, render, summary_table

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo
    from transformers import PreTrainedModel

REPORT_NAME = "subprune_report.json"
PAGE_NAME = "subprune_report.md"
PLOT_FOLDER = "plots"
FORMAT = 1


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
    def whole(cls, block: Block, **predictions: Any) -> "BlockReport":
        """Of a block that keeps every unit; `predictions` are `curve` and `predicted`."""
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
            stack=block.stack,
            **predictions,
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
    """

    budget: str
    target: str
    unit: str
    limit: float
    reached: float
    predicted_drift: float | None = None
    latencies: tuple[tuple[str, int, int, float], ...] = ()


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
class PruneReport:
    """What `prune` did.

    Args:
        model: Name or path of the model that was pruned.
        architecture: Class of the model.
        config: The `PruneConfig`, as a dict.
        blocks: Per block, in forward order.
        refusals: What was left whole and why.
        layout: `"stock"` or `"ragged"`.
        layout_reason: Why.
        parameters: Number of parameters of the whole model.
        macs: Multiply-accumulates of one forward on one sample of `measured_on`.
        latency: Median seconds of a forward on `measured_on`, timed in turns after pruning (before and after the run
            where whole experts go); `None` where weights were read from elsewhere meanwhile.
        measured_on: Batch size, length, device and threads of the figures above.
        drift: Output of the pruned against the original model, on held-out samples (see `evaluation.Drift`).
        data: Description of the calibration data.
        seconds: Wall time of each stage.
        peak_memory: Largest resident size of the process by the end of the run, bytes.
        versions: Of the packages that matter.
        metrics: Of labelled tasks, when they were evaluated.
        command: The command line that made it; empty when Python code did.
        allocation: The target, what was reached, and how it was shared out among blocks.
    """

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

    @property
    def drift_figures(self) -> dict[str, float]:
        """`drift` without the number of rows that it was measured on."""
        return {name: value for name, value in self.drift.items() if name != "rows"}

    def with_metrics(self, metrics: Sequence[TaskMetric]) -> "PruneReport":
        """This report with further metrics; they replace those of the same name on the same data."""
        new = {(metric.name, metric.data) for metric in metrics}
        return replace(self, metrics=(*(m for m in self.metrics if (m.name, m.data) not in new), *metrics))

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "PruneReport":
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
            if values.get("allocation"):
                values["allocation"] = Allocation(**_tuples(values["allocation"]))
        except (TypeError, KeyError) as error:
            raise ValueError(f"Not a pruning report: {error}.") from error
        return cls(**values)

    def save(self, folder: str | Path) -> Path:
        """Write the report into `folder`, made if need be: JSON, a Markdown page, and plots where matplotlib is.

        Returns:
            Path of `subprune_report.json`.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / REPORT_NAME
        path.write_text(json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n", encoding="utf-8")
        plots = {}
        if find_spec("matplotlib"):
            from .plots import save_plots

            plots = save_plots(self, folder / PLOT_FOLDER)
        shown = {title: f"{PLOT_FOLDER}/{plot.name}" for title, plot in plots.items()}
        (folder / PAGE_NAME).write_text(self.to_markdown(shown), encoding="utf-8")
        return path

    def push_to_hub(
        self,
        repo_id: str,
        model: "PreTrainedModel",
        processing_class: Any = None,
        *,
        private: bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        force: bool = False,
        token: str | None = None,
        commit_message: str | None = None,
        card_data: Mapping[str, Any] | None = None,
    ) -> "CommitInfo":
        """Upload the pruned model with its processor, model card, this report and plots, as one commit.

        Args:
            repo_id: `"user/name"` or `"organization/name"`; made if need be.
            model: After `prune`.
            processing_class: Tokenizer, image processor or processor; may be `None`.
            private: Whether a repo that is made is private; the default of the account when left out.
            revision: Branch to commit to, made if need be; `"main"` when left out.
            create_pr: Open a pull request with the commit.
            force: Overwrite a repo that was not pushed by hf_subprune.
            token: The one that `hf auth login` or `HF_TOKEN` stores when left out.
            commit_message: First line of the commit.
            card_data: Metadata of the card that replaces what is found out, e.g. `license`, `language`, `base_model`
                (a Hub id), `datasets`.

        Raises:
            ValueError: `repo_id` is not a valid one.
            PushError: nothing was committed. The message says why, where the saved model is, and the command that
                tries again.
        """
        from .hub import push_model  # the Hub is outermost: the report is read without it

        return push_model(
            self,
            repo_id,
            model,
            processing_class,
            card_data=card_data,
            private=private,
            revision=revision,
            create_pr=create_pr,
            force=force,
            token=token,
            commit_message=commit_message,
        )

    @classmethod
    def load(cls, path: str | Path) -> "PruneReport":
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

    def __str__(self) -> str:
        return render(summary_table(self), block_table(self))

    def to_markdown(self, plots: Mapping[str, str] | None = None) -> str:
        """The report as a page.

        Args:
            plots: Path of an image, as the page is to link it, per title.
        """
        parts = [f"# {self.architecture} pruned, {self.layout} layout", markdown_table(summary_table(self))]
        parts += [f"![{title}]({path})" for title, path in (plots or {}).items()]
        parts += ["## Blocks", markdown_table(block_table(self))]
        if self.refusals:
            parts += ["## Left whole", markdown_table(refusal_table(self.refusals))]
        settings = ", ".join(f"`{name}={value!r}`" for name, value in self.config.items())
        parts += ["## Settings", settings]
        if self.command:
            parts.append(f"```bash\n{self.command}\n```")
        return "\n\n".join(parts) + "\n"


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """Lists, nested ones too, as tuples, which JSON cannot hold."""

    def convert(value: Any) -> Any:
        return tuple(map(convert, value)) if isinstance(value, (list, tuple)) else value

    return {name: convert(value) for name, value in values.items()}
