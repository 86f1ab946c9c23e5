"""The model card of a pruned model: what the Hub reads in its header, what people read below it."""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Template
from transformers.utils import CONFIG_NAME, logging

from .loading_code import loading_code, processor_class, settings
from .plain import code, fenced, identifier, inline, is_repo_id, without_local
from .records import HTML_NAME, PLOT_FOLDER, PLOTS, Record
from .runtimes import runtime_table
from .tables import block_table, markdown_table, refusal_table, summary_table

logger = logging.get_logger(__name__)

CARD_NAME = "README.md"
_SIGNED = "<!-- Written by hf_subprune ({}): a push writes it anew unless something in it was changed. -->"
TEMPLATE = Path(__file__).with_name("card_template.md")
_WORDS = re.compile(r"[\w .,:/@+()?=&%~-]{1,300}")
INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag")

UNIT_NAMES = {
    "mlp": "MLP neurons",
    "attention": "attention heads",
    "channels": "convolution channels",
    "experts": "experts",
}

# Of the relations the Hub knows (adapter, finetune, merge, quantized), the one that says "the weights were changed".
RELATION = "finetune"


def write_card(
    folder: str | Path,
    report: Record,
    repo_id: str,
    card_data: Mapping[str, Any] | None = None,
    *,
    ask_hub: bool = True,
) -> Path:
    """Write `README.md` into a folder that holds the saved model, signed, so that it is known to be nobody's own.

    Args:
        folder: With `config.json`; its plots are shown.
        report: From `prune`.
        repo_id: Where the model will be loaded from.
        card_data: Metadata that replaces what is found out.
        ask_hub: Whether the card of an original model on the Hub is read there.

    Returns:
        Path of the card.
    """
    path = Path(folder) / CARD_NAME
    model_card(report, repo_id, folder=folder, card_data=card_data, ask_hub=ask_hub).save(path)
    text = path.read_text(encoding="utf-8").rstrip("\n") + "\n"
    path.write_text(f"{text}\n{_SIGNED.format(_digest(text))}\n", encoding="utf-8")
    return path


def may_write_card(folder: str | Path) -> bool:
    """Whether a folder has no card, or one that was written by `write_card` and not changed since."""
    path = Path(folder) / CARD_NAME
    if not os.path.lexists(path):
        return True
    if path.is_symlink() or not path.is_file():
        return False
    text, _, signed = path.read_text(encoding="utf-8", errors="replace").rstrip("\n").rpartition("\n\n")
    return signed == _SIGNED.format(_digest(f"{text}\n"))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def model_card(
    report: Record,
    repo_id: str,
    *,
    folder: str | Path | None = None,
    card_data: Mapping[str, Any] | None = None,
    ask_hub: bool = True,
) -> ModelCard:
    """The card of a pruned model.

    License, languages and task are those of the original model's card, if it is found on disk or on the Hub.

    Args:
        report: From `prune`.
        repo_id: Where the model will be loaded from.
        folder: With the saved model; tells which plots, processor and remote code there are.
        card_data: Metadata that replaces what is found out, e.g. `license`, `base_model`, `datasets`.
        ask_hub: Whether the card of an original model on the Hub is read there.
    """
    title = repo_id.split("/")[-1]
    base = base_card_data(report.model) if ask_hub or Path(report.model).is_dir() else {}
    local, report = report.model, without_local(report)
    metadata = _metadata(report, local, base, title, card_data or {})
    guarantees = [b.guarantee for b in report.blocks if b.guarantee is not None and b.units_after < b.units_before]
    pruned = {b.kind for b in report.blocks if b.units_after < b.units_before}
    base_model = metadata.get("base_model")
    processor, architecture = processor_class(folder), identifier(report.architecture)
    content = _template().render(
        card_data=metadata.to_yaml(),
        report=report,
        repo_id=repo_id,
        title=title,
        base=f"[{base_model}](https://huggingface.co/{base_model})"
        if is_repo_id(base_model)
        else code(report.model or architecture),
        units=" and ".join(name for kind, name in UNIT_NAMES.items() if kind in pruned) or "units",
        summary=markdown_table(summary_table(report)),
        plots=_plots(folder),
        page=folder is not None and (Path(folder) / HTML_NAME).is_file(),
        processor=processor,
        architecture=architecture,
        loading=loading_code(report, repo_id, processor),
        runtimes=runtime_table(report, repo_id),
        auto_class=_auto_class(folder, report.architecture),
        least_guarantee=min(guarantees, default=None),
        block_table=markdown_table(block_table(report)),
        refusal_table=markdown_table(refusal_table(report.refusals)),
        settings=settings(report.config),
        command=fenced(report.command),
        source=inline(str(report.data.get("source", "calibration data"))),
        versions=inline(", ".join(f"{name} {version}" for name, version in sorted(report.versions.items()))),
    )
    return ModelCard(content)


@cache
def _template() -> Template:
    """As `ModelCard.from_template` makes it, which takes as long as to write ten cards."""
    return Template(TEMPLATE.read_text(encoding="utf-8"))


def base_card_data(model: str) -> dict[str, Any]:
    """Metadata of the original model's card; empty when there is no card, or it cannot be reached or read.

    Args:
        model: Local folder or Hub id.
    """
    card = Path(model) / CARD_NAME
    try:
        if card.is_file():
            return ModelCard.load(card, ignore_metadata_errors=True).data.to_dict()
        return ModelCard.load(model, ignore_metadata_errors=True).data.to_dict() if _is_hub_id(model) else {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        logger.info("No license or language is inherited, the card of %s cannot be read: %s", model, error)
        return {}


def _is_hub_id(model: str) -> bool:
    return is_repo_id(model) and not Path(model).exists()


def _is_plain(value: Any) -> bool:
    """Whether something that another card says can be passed on: words, or a list of them."""
    if isinstance(value, list):
        return all(isinstance(one, str) and _is_plain(one) for one in value)
    return isinstance(value, str) and _WORDS.fullmatch(value) is not None


def _metadata(
    report: Record, model: str, base: Mapping[str, Any], title: str, replaced: Mapping[str, Any]
) -> ModelCardData:
    values = {name: base[name] for name in INHERITED if name in base and _is_plain(base[name])}
    # A local folder has no id to name; what it derives from is then what this model derives from.
    derived = base.get("base_model")
    named = [one for one in (derived if isinstance(derived, list) else [derived]) if is_repo_id(one)]
    base_model = model if _is_hub_id(model) else named if isinstance(derived, list) else next(iter(named), None)
    if base_model := replaced.get("base_model", base_model):
        values.update(base_model=base_model, base_model_relation=RELATION)
    if results := _results(report, base.get("pipeline_tag")):
        values.update(eval_results=results, model_name=title)
    values.update(library_name="transformers", tags=["subprune", "pruned"])
    return ModelCardData(**{**values, **replaced})


def _results(report: Record, task: str | None) -> list[EvalResult]:
    """Labelled metrics, and the drift where the task is known: every result of a card belongs to one."""
    results = [
        EvalResult(
            task_type=metric.task,
            dataset_type=metric.dataset,
            dataset_name=metric.dataset,
            dataset_split=metric.split or None,
            metric_type=metric.name,
            metric_value=round(metric.value.after, 6),
        )
        for metric in report.metrics
    ]
    if task:
        source = str(report.data.get("source", "calibration data"))
        results += [
            EvalResult(
                task_type=task,
                dataset_type=source,
                dataset_name=f"{source}, held out",
                metric_type=name,
                metric_name=f"{name.replace('_', ' ')} to the original model's output",
                metric_value=round(value, 6),
            )
            for name, value in report.drift_figures.items()
        ]
    return results


def _plots(folder: str | Path | None) -> dict[str, str]:
    """Paths of the plots that were drawn, as the card links them, per title."""
    if folder is None:
        return {}
    return {
        title: f"{PLOT_FOLDER}/{name}"
        for title, name in PLOTS.items()
        if (Path(folder) / PLOT_FOLDER / name).is_file()
    }


def _auto_class(folder: str | Path | None, architecture: str) -> str | None:
    """Which Auto class builds the architecture from the remote code beside the model."""
    if folder is None:
        return None
    config = json.loads((Path(folder) / CONFIG_NAME).read_text(encoding="utf-8"))
    classes = sorted(config.get("auto_map", {}).items(), reverse=True)
    served: dict[str, str] = {target.split(".")[-1]: name for name, target in classes}
    return identifier(served[architecture]) if architecture in served else None
