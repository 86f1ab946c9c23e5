"""Write a pruned model, its processor and its report into one folder, whole or not at all."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import split_torch_state_dict_into_shards
from transformers import PreTrainedModel
from transformers.utils import logging

from ..storage.remote_code import write_remote_code
from .page import save
from .records import REPORT_NAME, Record

logger = logging.get_logger(__name__)


def check_output(folder: str | Path) -> None:
    """Refuse a folder that holds something else than an earlier result of ours, or that cannot be made.

    Raises:
        ValueError: `folder` is a file, or a folder that is neither empty nor ours.
        OSError: nothing can be written beside it.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"The output {folder} is a file: give a folder.")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / REPORT_NAME).is_file():
        raise ValueError(
            f"The output folder {folder} exists and was not written by hf_subprune (it holds no {REPORT_NAME}): "
            "give another folder, or empty this one."
        )
    parent = next(path for path in folder.absolute().parents if path.exists())
    try:
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=parent):  # as `save_pruned` does
            pass
    except OSError as error:
        raise OSError(
            f"The output folder {folder} cannot be made, {parent} takes no new folder ({error.strerror}): "
            "give another folder."
        ) from error


def check_shard_size(size: int | str) -> None:
    """Refuse what `save_pretrained` does not take as its `max_shard_size`, before there is something to save.

    Raises:
        ValueError: `size` is no size.
    """
    try:
        split_torch_state_dict_into_shards({}, max_shard_size=size)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"max_shard_size takes a size such as '2GB' or '500MB', got {size!r}.") from error


def save_pruned(
    folder: str | Path, model: PreTrainedModel, processing_class: Any, report: Record, **save_options: Any
) -> None:
    """Save into a folder beside `folder` and put it in place when it is complete.

    A ragged model gets the code that loads it where hf_subprune is not installed.

    Args:
        folder: Replaced when it is an earlier result of ours.
        model: After `prune`.
        processing_class: Saved beside the model; may be `None`.
        report: From `prune`.
        save_options: For `save_pretrained`, e.g. `max_shard_size`.

    Raises:
        ValueError, OSError: as `check_output`.
    """
    folder = Path(folder)
    check_output(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
        staged = Path(scratch) / "new"
        model.save_pretrained(staged, **save_options)
        if report.layout == "ragged":
            try:
                write_remote_code(staged, model)
            except ValueError as error:
                logger.warning("The model will load with hf_subprune only: %s", error)
        if processing_class is not None:
            processing_class.save_pretrained(staged)
        save(report, staged)
        if folder.exists():
            shutil.move(folder, Path(scratch) / "old")
        shutil.move(staged, folder)
