"""What a pruning run did and what it measured: dataclasses, JSON, and a page to read."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..blocks import Refusal
from .records import FORMAT, PAGE_NAME, PLOT_FOLDER, REPORT_NAME, Allocation, BlockReport, Change, TaskMetric, _tuples
from .tables import block_table, markdown_table, refusal_table, render, summary_table

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo
    from transformers import PreTrainedModel


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
        from .hub import push_model

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
