"""Files that are whole or not there: written under another name, synced to disk, then renamed.

They are read as data: nothing that somebody else could have put there is run. What has changed since it was written
is found by its checksum.
"""

import hashlib
import importlib
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers.utils import ModelOutput

_PLAIN = {"fractions.Fraction": Fraction, "builtins.frozenset": frozenset}
"""Plain values that torch does not read unasked."""


class DamagedError(ValueError):
    """A file is not as it was written.

    Args:
        path: Of the file.
        found: What is the matter with it.
    """

    def __init__(self, path: Path, found: str) -> None:
        super().__init__(f"{path} is not as it was written ({found}).")


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
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """What a folder lists survives a power cut; Windows opens none, and sees to that itself."""
    if os.name == "nt":
        return
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def check_space(folder: Path, needed: int, what: str) -> None:
    """Raise `OSError` if a folder's disk cannot take as many bytes."""
    if shutil.disk_usage(folder).free < needed:
        raise OSError(
            f"{what[:1].upper()}{what[1:]} can take up to {needed / 1e9:.3g} GB in {folder}, where {_free(folder)} "
            "are free: make room, or write to another disk."
        )


def _free(folder: Path) -> str:
    return f"{shutil.disk_usage(folder).free / 1e9:.3g} GB"


def digest_of(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(2**22):
            digest.update(piece)
    return digest.hexdigest()


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """As safetensors."""
    with replacing(path) as part:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part)


def write_json(path: Path, values: Any) -> None:
    """As JSON, with a checksum."""
    text = json.dumps({"values": values, "sha256": _sealed(values)}, indent=2, sort_keys=True)
    with replacing(path) as part:
        part.write_text(text + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """What `write_json` wrote.

    Raises:
        DamagedError: the file holds something else.
    """
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        if held["sha256"] == _sealed(held["values"]):
            return held["values"]
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedError(path, f"{type(error).__name__}: {error}") from error
    raise DamagedError(path, "its checksum is another one")


def _sealed(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def write_objects(path: Path, values: Any) -> None:
    """Tensors in dataclasses of this package, outputs of models, lists, dicts, frozen sets and plain values."""
    with replacing(path) as part:
        torch.save(values, part)  # an archive that holds a checksum of each of its entries


def read_objects(path: Path) -> Any:
    """What `write_objects` wrote, tensors mapped into memory. No other class than those named there is made.

    Raises:
        DamagedError: the file is gone or cut short, or holds something else.
    """
    try:
        named = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        with torch.serialization.safe_globals([_known(name) for name in named]):
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise DamagedError(path, str(error).splitlines()[0]) from error


def check_objects(path: Path) -> None:
    """Compare what `write_objects` wrote with its checksums.

    Raises:
        DamagedError: it is gone, or not as it was.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (OSError, ValueError, EOFError, NotImplementedError, zipfile.BadZipFile) as error:
        raise DamagedError(path, f"{type(error).__name__}: {error}") from error
    if damaged is not None:
        raise DamagedError(path, f"the checksum of {damaged} is another one")


def _known(name: str) -> Any:
    """A class of which `read_objects` makes instances, by its dotted path.

    Raises:
        ValueError: it is none.
    """
    module, _, leaf = name.rpartition(".")
    package = module.split(".")[0]
    if name in _PLAIN:
        return _PLAIN[name]
    if package in (__package__.split(".")[0], "transformers"):
        found = getattr(importlib.import_module(module), leaf, None)
        own = package != "transformers" and (is_dataclass(found) or _is_kind(found, tuple))
        if own or _is_kind(found, ModelOutput):
            return found
    raise ValueError(f"it names {name}, which is never written")


def _is_kind(found: Any, kind: type) -> bool:
    return isinstance(found, type) and issubclass(found, kind)


def once(path: Path | None, compute: Callable[[], Any]) -> Any:
    """What the file holds, or else what `compute` returns, written to it first; no file without a path.

    Raises:
        DamagedError: the file is not as it was written.
    """
    if path is None:
        return compute()
    if path.exists():
        check_objects(path)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_objects(path, compute())
    return read_objects(path)
