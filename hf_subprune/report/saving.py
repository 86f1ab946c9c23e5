"""Write a pruned model, its processor, its report and its card into one folder, whole or not at all."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import split_torch_state_dict_into_shards
from transformers import PreTrainedModel

from .card import CARD_NAME, may_write_card, write_card
from .page import save
from .place import Place, claimed
from .records import Record


def check_output(folder: str | Path) -> None:
    """Refuse a folder that a result could not be put into in the end; nothing is left there.

    Raises:
        ValueError, OSError: as `place.claimed`.
    """
    with claimed(folder):
        pass


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
    """Save beside `folder` and put it in place when it is complete.

    A card of yours that is there stays.

    Args:
        folder: What an earlier result of ours has there is replaced; other files stay.
        model: After `prune`.
        processing_class: Saved beside the model; may be `None`.
        report: From `prune`.
        save_options: For `save_pretrained`, e.g. `max_shard_size`.

    Raises:
        ValueError, OSError: as `place.claimed` and `Place.install`.
    """
    with claimed(folder) as place:
        save_to(place, model, processing_class, report, save_options)


def save_to(
    place: Place, model: PreTrainedModel, processing_class: Any, report: Record, save_options: Mapping[str, Any]
) -> None:
    """As `save_pruned`, into a folder that the run has claimed."""
    staged = place.staged
    place.discard_staged()
    try:
        model.save_pretrained(staged, **save_options)
        if processing_class is not None:
            processing_class.save_pretrained(staged)
        save(report, staged)
        if may_write_card(place.folder):
            write_card(staged, report, place.folder.name, ask_hub=False)
        else:
            (staged / CARD_NAME).unlink(missing_ok=True)
    except BaseException:
        place.discard_staged()
        raise
    place.install()
