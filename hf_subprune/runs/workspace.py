"""What a run keeps between its steps: in memory, or in files that a run which was stopped goes on from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

from .durable import check_space, once
from .processes import from_all, from_process, is_mine
from .progress import Clock
from .store import Files, Store

_T = TypeVar("_T")

# In memory, what one stage leaves for another takes no more than this; it is made again where it would.
_HELD_BYTES = 2 * 2**30


class Workspace:
    """The clock of a run, what it has found so far, and what takes back all that it did to the model.

    Every process of a run has one, and all of them call `once` and `exchange` together. Where and whether anything is
    written is known here alone.

    Args:
        folder: For this process's files, made if need be; everything stays in memory without one.
        clock: Of the stages before.

    Attributes:
        undo: Takes the model back, in the reverse of the order in which it was changed.
    """

    def __init__(self, folder: Path | None = None, clock: Clock | None = None) -> None:
        self.folder, self.clock = folder, clock or Clock()
        self.undo = ExitStack()

    def again(self) -> Workspace:
        """The same files, a clock that goes on from here, and nothing to take back yet."""
        return Workspace(self.folder, Clock(self.clock.seconds))

    @contextmanager
    def undone_on_failure(self) -> Iterator[None]:
        """Whatever ends what is done inside, the model is then as it was before this workspace changed it."""
        try:
            yield
        except BaseException:
            with self.undo:  # where taking back fails, what it was for stays known
                raise

    def store(self, name: str) -> Store:
        """Where one stage keeps what it makes."""
        return Store() if self.folder is None else Files(self.folder / name)

    def holds(self, size: int) -> bool:
        """Whether what takes so many bytes may stay in memory from one stage to another."""
        return self.folder is None and size <= _HELD_BYTES

    def check_space(self, needed: Callable[[], int], what: str) -> None:
        """Raise `OSError` where files of so many bytes would find no room; how many is asked where there are files."""
        if self.folder is not None:
            check_space(self.folder, needed(), what)

    def once(self, name: str, compute: Callable[[], _T]) -> _T:
        """What `compute` returns, or returned before the run was stopped.

        Raises:
            DamagedError: that is not as it was written.
        """
        path = self._file(name)
        # A stop may have come when only some processes had written their files.
        if path is not None and not all(from_all(path.exists())):
            path.unlink(missing_ok=True)
        return once(path, compute)

    def own(self, owner: int, name: str, compute: Callable[[], _T]) -> _T | None:
        """As `once`, in the process `owner` alone; `None` in the others."""
        return once(self._file(name), compute) if is_mine(owner) else None

    def exchange(self, owner: int, value: _T | None) -> _T:
        """What `own` returned in its process, in every process."""
        return from_process(owner, value)  # type: ignore[return-value]

    def _file(self, name: str) -> Path | None:
        return None if self.folder is None else self.folder / f"{name}.pt"
