"""The folder of a result: one run at a time, tried before the work, filled whole or not at all.

What is not finished lies in `.NAME.partial` beside the folder, or in it where nothing can be moved in from beside it:
a mount point, or a folder in one that takes no other. The files of a result are moved in one by one, behind those of
an earlier one, so that links, mount points and files of others stay what they are.
"""

import json
import os
import shutil
import socket
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from filelock import FileLock, Timeout
from transformers.utils import CONFIG_NAME, logging

from .records import HTML_NAME, PAGE_NAME, PLOT_FOLDER, PLOTS, REPORT_NAME

logger = logging.get_logger(__name__)

FILES_NAME = "subprune_files.json"
"""Lists the files of a result, which a later one replaces: nothing else in the folder is touched."""

WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model*.bin.index.json")
"""What `from_pretrained` may take for the weights of a model."""

ASIDE = ".yours"
"""Ends the name of somebody's file that lay where one of a result goes."""

_MADE_BY_SYSTEMS = {"lost+found"}


@dataclass(frozen=True)
class Place:
    """A folder that one run writes its result to.

    Args:
        folder: Of the result, links followed; it may not be there yet.
        partial: Holds what is not finished.
    """

    folder: Path
    partial: Path

    @property
    def staged(self) -> Path:
        """Where the result is put together."""
        return self.partial / "new"

    @property
    def _old(self) -> Path:
        return self.partial / "old"

    def install(self) -> None:
        """Put what is staged into the folder, in place of an earlier result.

        Raises:
            OSError: it cannot be; the earlier result is back, and what is staged is kept and named.
        """
        names = [*_files(self.staged), FILES_NAME]
        _write_list(self.staged, names)
        for name in names:
            _sync(self.staged / name)
        if not self.folder.exists():
            self.staged.rename(self.folder)
            return
        moved: list[tuple[Path, Path]] = []
        try:
            self._old.mkdir()
            own = written(self.folder)
            for name in own:
                _move(self.folder / name, self._old / name)
            for name in _in_the_way(self.folder, names):
                moved.append((self.folder / name, _unused(self.folder / f"{name}{ASIDE}")))
                _move(*moved[-1])
            # No config, no model: whoever looks meanwhile finds neither half of one.
            for name in sorted(names, key=(CONFIG_NAME, FILES_NAME).count):
                _move(self.staged / name, self.folder / name)
        except BaseException as error:
            self.put_back()
            for path, aside in moved:
                if aside.exists():
                    _move(aside, path)
            if isinstance(error, OSError):
                raise OSError(
                    f"The result is complete in {self.staged}, but cannot be moved to {self.folder} ({error}). What "
                    "was there is back: move it yourself, or start the same command again."
                ) from error
            raise
        if moved:
            now = ", ".join(path.name for _, path in moved)
            logger.warning(f"Files in {self.folder} that hf_subprune did not write made way: they are now {now}.")
        shutil.rmtree(self._old)
        self.discard_staged()
        _drop_empty(self.folder, own)

    def put_back(self) -> None:
        """After a move that was cut short: the earlier result where it was, and the new one staged."""
        if not self._old.is_dir():
            return
        if (self.staged / FILES_NAME).is_file():  # it is moved last
            for name in _listed(self.staged):
                if not (self.staged / name).exists() and (self.folder / name).exists():
                    _move(self.folder / name, self.staged / name)
            for name in _files(self._old):
                _move(self._old / name, self.folder / name)
        shutil.rmtree(self._old)

    def discard_staged(self) -> None:
        """Nothing is staged any more."""
        shutil.rmtree(self.staged, ignore_errors=True)


@contextmanager
def claimed(folder: str | Path) -> Iterator[Place]:
    """The folder for one run, which nobody else writes to meanwhile; what a killed one left staged is gone.

    Before anything else, a trial is moved to where the result will go. Links are followed.

    Args:
        folder: New, empty, or with an earlier result of ours, whatever else lies beside that.

    Raises:
        ValueError: `folder` is a file, or holds something and no result of ours; or what lies beside it belongs to
            another user.
        BlockingIOError: another run writes there; it is named.
        OSError: nothing can be moved there.
    """
    given, folder = folder, Path(folder).resolve()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"The output {given} is a file: give a folder.")
    refused: OSError | None = None
    for beside in (folder.parent, folder) if folder.is_dir() else (folder.parent,):
        place = Place(folder, beside / f".{folder.name}.partial")
        with ExitStack() as stack:
            try:
                stack.enter_context(_made(place.partial))
                stack.enter_context(_locked(place))
                place.put_back()
                place.discard_staged()
                _try(place)
            except BlockingIOError:
                raise
            except OSError as error:
                refused = refused or error
                continue
            _check_ours(folder)
            yield place
            return
    exists = next(path for path in folder.parents if path.exists())
    raise OSError(
        f"The output folder {folder} cannot be made, {exists} takes no new folder "
        f"({refused.strerror if refused and refused.strerror else refused}): give another folder."
    ) from refused


@contextmanager
def _made(partial: Path) -> Iterator[None]:
    """The folder and those that it lies in; what then is empty goes again."""
    new = [path for path in partial.parents if not path.exists()]
    try:
        partial.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = partial.lstat()
        mine = not hasattr(os, "getuid") or found.st_uid == os.getuid()  # on Windows, folders of others are closed
        if partial.is_symlink() or not mine:
            raise ValueError(
                f"{partial} was not made by you, who run this: nothing is read from there. Remove it, or choose "
                "another output."
            )
        yield
    finally:
        with suppress(OSError):
            for path in (partial, *new):
                path.rmdir()


@contextmanager
def _locked(place: Place) -> Iterator[None]:
    lock, holder = FileLock(place.partial / "lock"), place.partial / "holder"
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        said = holder.read_text(encoding="utf-8") if holder.is_file() else "another process"
        raise BlockingIOError(
            f"{said} writes to {place.folder} now, so nothing was done. Wait until it has ended, stop it, or choose "
            "another output."
        ) from error
    try:
        holder.write_text(f"Process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
        yield
    finally:
        holder.unlink(missing_ok=True)
        with suppress(PermissionError):  # of Windows, which removes no file that is open
            (place.partial / "lock").unlink(missing_ok=True)  # while it is held: who comes now makes another
        lock.release()
        if os.name == "nt":
            (place.partial / "lock").unlink(missing_ok=True)


def _try(place: Place) -> None:
    """Move a trial to where the result will go."""
    trial, target = place.partial / "trial", place.folder
    if target.is_dir():
        target = target / f".{trial.name}"
        trial.touch()
    else:
        trial.mkdir(exist_ok=True)
    try:
        trial.rename(target)
    except OSError:
        trial.rmdir() if trial.is_dir() else trial.unlink()
        raise
    target.rmdir() if target.is_dir() else target.unlink()


def _check_ours(folder: Path) -> None:
    if not folder.is_dir() or (folder / REPORT_NAME).is_file():
        return
    held = {path.name for path in folder.iterdir()} - _MADE_BY_SYSTEMS - {f".{folder.name}.partial"}
    if held:
        raise ValueError(
            f"The output folder {folder} exists and was not written by hf_subprune (it holds no {REPORT_NAME}): "
            "give another folder, or empty this one."
        )


def written(folder: Path) -> list[str]:
    """Names of the files in a folder that are of a result of ours: those that its list has, and its report."""
    report = (REPORT_NAME, PAGE_NAME, HTML_NAME, *(f"{PLOT_FOLDER}/{name}" for name in PLOTS.values()))
    names = dict.fromkeys([*_listed(folder), *(report if (folder / REPORT_NAME).is_file() else ())])
    return [name for name in names if _is_file_in(folder, name)]


def add_written(folder: Path, name: str) -> None:
    """Put a further file on the list of a result."""
    if (folder / FILES_NAME).is_file():
        _write_list(folder, [*_listed(folder), name])


def _listed(folder: Path) -> list[str]:
    path = folder / FILES_NAME
    try:
        names = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    except ValueError:
        names = []
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def _write_list(folder: Path, names: Iterable[str]) -> None:
    (folder / FILES_NAME).write_text(json.dumps(sorted(set(names)), indent=2) + "\n", encoding="utf-8")


def _is_file_in(folder: Path, name: str) -> bool:
    """Whether a name, which anybody may have written down, is of a file within the folder."""
    path = folder / PurePosixPath(name)
    inside = path.parent.resolve().is_relative_to(folder.resolve()) and ".." not in path.parts
    return inside and (path.is_file() or path.is_symlink())


def _files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


def _in_the_way(folder: Path, names: Iterable[str]) -> list[str]:
    """Files that are not ours where new ones go, or that could be taken for the model's weights."""
    weights = [path.name for path in folder.iterdir() if any(fnmatchcase(path.name, one) for one in WEIGHTS)]
    return [name for name in dict.fromkeys([*names, *weights]) if os.path.lexists(folder / name)]


def _unused(path: Path) -> Path:
    return path if not os.path.lexists(path) else _unused(path.with_name(f"{path.name}{ASIDE}"))


def _move(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    source.rename(target)


def _drop_empty(folder: Path, names: Iterable[str]) -> None:
    """Folders in which an earlier result had files, if they are empty now."""
    for path in {(folder / name).parent for name in names} - {folder}:
        with suppress(OSError):
            path.rmdir()


def _sync(path: Path) -> None:
    with path.open("rb+") as file:  # Windows writes nothing down of what is only read
        os.fsync(file.fileno())
