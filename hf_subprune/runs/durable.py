"""Files that are whole or not there: written under another name, synced to disk, then renamed."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to; at the end the file takes the place of `path`, and survives a power cut."""
    part = path.with_name(f"{path.name}.part")
    try:
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        part.replace(path)
    except (OSError, RuntimeError, SafetensorError) as error:  # safetensors and torch wrap what the system says
        part.unlink(missing_ok=True)
        raise OSError(
            f"{path} could not be written: {error}. {_free(path.parent)} are free there. Make room and start the same "
            "command again: what is finished is kept."
        ) from error
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def check_space(folder: Path, needed: int, what: str) -> None:
    """Raise `OSError` if a folder's disk cannot take as many bytes."""
    if shutil.disk_usage(folder).free < needed:
        raise OSError(
            f"{what[:1].upper()}{what[1:]} can take up to {needed / 1e9:.3g} GB in {folder}, where {_free(folder)} "
            "are free: make room, or write to another disk."
        )


def _free(folder: Path) -> str:
    return f"{shutil.disk_usage(folder).free / 1e9:.3g} GB"


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """As safetensors."""
    with replacing(path) as part:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part)


def write_json(path: Path, values: Any) -> None:
    """As JSON."""
    with replacing(path) as part:
        part.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_objects(path: Path, values: Any) -> None:
    """Anything that pickles; tensors can be mapped into memory when it is read."""
    with replacing(path) as part:
        torch.save(values, part)


def read_objects(path: Path) -> Any:
    """What `write_objects` wrote, tensors mapped into memory. Only for files of one's own: it unpickles."""
    return torch.load(path, map_location="cpu", mmap=True, weights_only=False)


def once(path: Path | None, compute: Callable[[], Any]) -> Any:
    """What the file holds, or else what `compute` returns, written to it first; no file without a path."""
    if path is None:
        return compute()
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_objects(path, compute())
    return read_objects(path)
