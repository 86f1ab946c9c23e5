"""Where a stage keeps what it makes: in memory, or in files that a run which was stopped goes on from."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device

from .durable import check_objects, read_json, read_objects, write_json, write_objects
from .processes import from_all, processes, summed

Kept = Mapping[str, Sequence[Mapping[str, Any]]]
"""By part of a store, a list of what stands for values there, each by a name of its own."""

_STATE = "state.json"


class Store:
    """In memory: values are held as they are, and nothing outlasts the run."""

    def part(self, name: str) -> Store:
        """A store for values of one kind."""
        return Store()

    def keep(self, name: str, value: Any) -> Any:
        """What stands for a value from now on; a name that is used again replaces it."""
        return value

    def read(self, kept: Any, device: torch.device | None = None) -> Any:
        """The value that `keep` was given; what was in a file is brought to a device."""
        return kept

    def drop(self, kept: Any) -> None:
        """A value is not read again."""

    def sum(self, name: str, m: int, device: torch.device) -> MatrixSum:
        """`(m, m)` zeros, to be added to; needed on a device."""
        return MatrixSum(m, device)

    def commit(self, position: int, kept: Kept) -> None:
        """Make a step final: a run that is stopped from now on goes on behind it, with what is `kept` in parts."""

    def finished(self) -> int:
        """How many steps are final in every process."""
        return 0

    def resume(self, position: int) -> Kept:
        """What was kept when a step was made final."""
        raise KeyError(position)


class Files(Store):
    """In files of a folder, which is made if need be; a file's name stands for what it holds.

    What an earlier run wrote is compared with its checksums when it is first read.

    Raises:
        DamagedError: on reading, a file is not as it was written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._known: set[str] = set()
        folder.mkdir(parents=True, exist_ok=True)

    def part(self, name: str) -> Store:
        return Files(self.folder / name)

    def keep(self, name: str, value: Any) -> str:
        write_objects(self.folder / f"{name}.pt", value)
        self._known.add(f"{name}.pt")
        return f"{name}.pt"

    def read(self, kept: str, device: torch.device | None = None) -> Any:
        if kept not in self._known:
            check_objects(self.folder / kept)
            self._known.add(kept)
        value = read_objects(self.folder / kept)
        return value if device is None else send_to_device(value, device)

    def drop(self, kept: str) -> None:
        (self.folder / kept).unlink()  # what is mapped into memory stays until it is let go of

    def sum(self, name: str, m: int, device: torch.device) -> MatrixSum:
        return MatrixFile(self.folder / f"{name}.bin", m, device)

    def commit(self, position: int, kept: Kept) -> None:
        """One rename makes the step final for all parts; then what only earlier ones needed can go."""
        before = [state for state in self._states() if state["position"] == position - 1]
        files = {
            part: [{name: file for name, file in files.items() if file is not None} for files in values]
            for part, values in kept.items()
        }
        states = [*(before if processes() > 1 else []), {"position": position, "files": files}]
        write_json(self.folder / _STATE, states)
        for part in kept:
            needed = {file for state in states for files in state["files"][part] for file in files.values()}
            for path in (self.folder / part).iterdir():
                if path.name not in needed:
                    path.unlink()

    def finished(self) -> int:
        return min(from_all(max((state["position"] for state in self._states()), default=0)))

    def resume(self, position: int) -> Kept:
        return next(state["files"] for state in self._states() if state["position"] == position)

    def _states(self) -> list[dict[str, Any]]:
        """The last state; the last two where there are several processes, one of which may be a step behind."""
        path = self.folder / _STATE
        return read_json(path) if path.exists() else []


class MatrixSum:
    """A sum of `(m, m)` matrices in float64, in memory.

    Args:
        m: Their size.
        device: Where the sum is needed.
    """

    def __init__(self, m: int, device: torch.device) -> None:
        self.device = device
        self._total = torch.zeros(m, m, dtype=torch.float64, device=device)

    def add(self, matrix: torch.Tensor) -> None:
        """Add a matrix of any dtype."""
        total = self.total()
        total += matrix.to(total.device)

    def add_up(self) -> None:
        """Add the sums of all processes."""
        self._total = summed(self._total)

    def total(self) -> torch.Tensor:
        """The sum; it is not to be changed."""
        return self._total

    def drop(self) -> None:
        """The sum is not read again."""


class MatrixFile(MatrixSum):
    """As `MatrixSum`, in a file that is mapped into memory for as long as its total is held.

    Args:
        path: Of the file, which is made anew.
        m, device: As of `MatrixSum`.
    """

    def __init__(self, path: Path, m: int, device: torch.device) -> None:
        self.path, self.m, self.device = path, m, device
        with path.open("wb") as file:  # now: to write into a mapped file on a full disk kills the process
            os.posix_fallocate(file.fileno(), 0, m * m * 8)

    def add_up(self) -> None:
        if processes() > 1:
            total = self.total()
            total.copy_(summed(total.to(self.device)))

    def total(self) -> torch.Tensor:
        mapped = torch.from_file(str(self.path), shared=True, size=self.m * self.m, dtype=torch.float64)
        return mapped.view(self.m, self.m)

    def drop(self) -> None:
        self.path.unlink()
