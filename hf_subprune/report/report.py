"""The report that `prune` returns: a record that can be read, saved and pushed."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .page import save, to_markdown
from .records import Record
from .tables import block_table, html_table, render, summary_table, with_unit

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo
    from transformers import PreTrainedModel


@dataclass(frozen=True, repr=False)
class PruneReport(Record):
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
        drift: Output of the pruned against the original model, on held-out samples (see `evaluation.drift.Drift`).
        data: Description of the calibration data.
        seconds: Wall time of each stage.
        peak_memory: Largest resident size of the process by the end of the run, bytes.
        versions: Of the packages that matter.
        metrics: Of labelled tasks, when they were evaluated.
        command: The command line that made it; empty when Python code did.
        allocation: The target, what was reached, and how it was shared out among blocks.
        continuations: How both models continue some texts, of a language model whose tokenizer is known.
        renewed_norms: Batch norms whose running statistics were taken anew on the calibration samples, as they are
            where channels went and the drift is less with them.
        intervals: `(low, high)` by figure: of `drift`, 95% over the held-out samples; of `"latency_ratio"`, the least
            and the largest of the turns.
    """

    def save(self, folder: str | Path) -> Path:
        """Write the report into `folder`, made if need be: JSON, a Markdown page, and plots where matplotlib is.

        Returns:
            Path of `subprune_report.json`.
        """
        return save(self, folder)

    def accompany(self, folder: str | Path) -> None:
        """Write report and card beside the model, as `save_pretrained` does with a model that `prune` has pruned.

        Nothing is drawn or asked for on the Hub, and a card of yours that is there stays.

        Args:
            folder: Holds the saved model.
        """
        from .card import may_write_card, write_card

        save(self, folder, with_plots=False)
        if may_write_card(folder):
            write_card(folder, self, Path(folder).resolve().name, ask_hub=False)

    def to_markdown(self, plots: Mapping[str, str] | None = None) -> str:
        """The report as a page.

        Args:
            plots: Path of an image, as the page is to link it, per title.
        """
        return to_markdown(self, plots)

    def __str__(self) -> str:
        return render(summary_table(self), block_table(self))

    def __repr__(self) -> str:
        before, after = with_unit(self.parameters.before), with_unit(self.parameters.after)
        return f"{type(self).__name__}({self.architecture}, {before} to {after} parameters, {len(self.blocks)} blocks)"

    def _repr_html_(self) -> str:
        blocks = f"<details><summary>Blocks</summary>{html_table(block_table(self))}</details>"
        return html_table(summary_table(self)) + blocks

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
        from .hub import PushOptions, push_model

        options = PushOptions(
            private=private,
            revision=revision,
            create_pr=create_pr,
            force=force,
            token=token,
            commit_message=commit_message,
        )
        return push_model(self, repo_id, model, processing_class, options, card_data=card_data)
