"""How a pruned model is loaded, as code to copy."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config import PruneConfig
from .plain import fenced, identifier
from .records import Record


def loading_code(record: Record, repo_id: str, processor: str | None) -> str:
    """What loads the model, and what makes its inputs.

    Args:
        record: Of the model.
        repo_id: Name or path to load it by.
        processor: Auto class of what makes its inputs, if it was saved.
    """
    architecture = identifier(record.architecture)
    imported = ", ".join(sorted(filter(None, [architecture, processor])))
    lines = [] if record.layout == "stock" else ["import hf_subprune  # teaches from_pretrained the widths"]
    lines += [f"from transformers import {imported}", "", f'model = {architecture}.from_pretrained("{repo_id}")']
    if processor is not None:
        name = "tokenizer" if processor == "AutoTokenizer" else "processor"
        lines.append(f'{name} = {processor}.from_pretrained("{repo_id}")')
    return "\n".join(lines)


def processor_class(folder: str | Path | None) -> str | None:
    """What loads the processor that was saved beside the model."""
    if folder is None:
        return None
    if any((Path(folder) / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
        return "AutoProcessor"
    return "AutoTokenizer" if (Path(folder) / "tokenizer_config.json").is_file() else None


def settings(config: Mapping[str, Any]) -> str:
    """Arguments of the `PruneConfig`, those with their default value left out."""
    defaults = PruneConfig().to_dict()
    return fenced(", ".join(f"{name}={value!r}" for name, value in config.items() if value != defaults.get(name)))
