"""The stages of a run as they are shown while it works: by name, how many there are, and how long the rest may take.

Nothing heavy is imported here: a command shows its first stage before torch is there.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol, TypeVar

_T = TypeVar("_T")

READING, EXPERTS, FINDING, ORIGINAL = "Reading the data", "Whole experts", "Finding blocks", "Measuring the original"
SENSITIVITIES, LOSSES, SHARING = "Sensitivities", "What each block loses", "Sharing out"
SOLVING, CHECKING, MEASURING = "Pruning", "Checking", "Measuring the result"
OPENING, LOADING, GENERATING = "Opening the data", "Loading the model", "Making up text"
SAVING, PUSHING, EXPORTING, RELOADING = "Saving", "Pushing", "Exporting", "Loading the result again"
EMBEDDING, EMBEDDING_PRUNED = "Embedding unseen text", "Embedding it with the pruned models"
LOADING_ORIGINAL, LOADING_PRUNED = "Loading the original", "Loading the pruned model"
TIMING, COMPARING = "Timing both", "Comparing outputs"
SCORING_ORIGINAL, SCORING_PRUNED = "Scoring the original", "Scoring the pruned model"
SURVEYING = (READING, FINDING, ORIGINAL, SENSITIVITIES, LOSSES)
SHRINKING = (SHARING, SOLVING, CHECKING, MEASURING)
PRUNING = (*SURVEYING, *SHRINKING)
"""What `prune` does, in order; some runs pass over some."""

_NEURONS = tuple(stage for stage in PRUNING if stage != LOSSES)  # a size of one kind of units leaves no choice
_BASELINE = tuple(stage for stage in _NEURONS if stage != SENSITIVITIES)
DEMO = (LOADING, EMBEDDING, *_NEURONS, *_BASELINE, EMBEDDING_PRUNED, SAVING, RELOADING)

_BETWEEN_LINES = 8.0  # seconds; ten, which is too long, where a machine is too busy to keep to it
_PRIOR = 0.25  # of the whole: what was expected counts as much as that, when stages took more or less


def with_experts(stages: Sequence[str], units: Sequence[str]) -> tuple[str, ...]:
    """The stages of `prune`, and among them that of whole experts where these are among the units."""
    place = stages.index(READING) + 1
    return (*stages[:place], EXPERTS, *stages[place:]) if "experts" in units else tuple(stages)


class Run:
    """How far a run is.

    Args:
        stages: Names of all stages, in order; a run may pass over some, and names may come again.

    Attributes:
        name: Of the stage that runs.
        place: Its number, from 1.
        done: Steps of the stage that are done.
        total: Steps that it has; 0 where nobody counts them.
        expected: Seconds that stages take, by name, as far as somebody has told.
    """

    def __init__(self, stages: Sequence[str]) -> None:
        self.stages, self.expected = list(stages), dict[str, float]()
        self.name, self.place, self.done, self.total = "", 0, 0, 0
        self._began = self._started = time.monotonic()
        self._took = self._foretold = 0.0

    def start(self, name: str, total: int = 0) -> bool:
        """Go on to the next stage of this name, or back to one that is done again; whether there is one."""
        if name not in self.stages:
            return False
        self._finish()
        ahead = self.stages[self.place :]
        self.place = 1 + (self.place + ahead.index(name) if name in ahead else self.stages.index(name))
        self.name, self.done, self.total, self._started = name, 0, total, time.monotonic()
        return True

    def _finish(self) -> None:
        if self.name in self.expected:
            self._took += self.seconds_in_stage()
            self._foretold += self.expected[self.name]

    def seconds(self) -> float:
        """Since the run began."""
        return time.monotonic() - self._began

    def seconds_in_stage(self) -> float:
        """Since the stage began."""
        return time.monotonic() - self._started

    def left(self) -> float | None:
        """Seconds until the run ends, by what stages were expected to take and have taken; `None` while unknown."""
        rest = self.stages[self.place :]
        if not self.expected or not self.expected.keys() >= {self.name, *rest}:
            return None
        doubt = _PRIOR * sum(self.expected[name] for name in self.stages if name in self.expected)
        pace = (doubt + self._took) / (doubt + self._foretold) if doubt else 1.0
        expected, spent = self.expected[self.name] * pace, self.seconds_in_stage()
        current = max(expected - spent, 0.0)
        if self.done:
            share = self.done / self.total  # the further the stage is, the more what it took itself counts
            current = share * spent * (1 - share) / share + (1 - share) * current
        return current + pace * sum(self.expected[name] for name in rest)


class Display(Protocol):
    """Shows a run to somebody."""

    def open(self, run: Run) -> None:
        """Before the first stage."""

    def started(self) -> None:
        """The run is in another stage."""

    def advanced(self) -> None:
        """A step of the stage is done."""

    def close(self) -> None:
        """The run is over; nothing comes after this."""


class Lines:
    """A line for each stage when it starts, and one every eight seconds that no other came.

    Args:
        write: Takes a line.
        between: Seconds from one line to the next, at most.
    """

    def __init__(self, write: Callable[[str], object], between: float = _BETWEEN_LINES) -> None:
        self._write, self._between = write, between
        self._closed, self._lock, self._last = threading.Event(), threading.Lock(), time.monotonic()

    def open(self, run: Run) -> None:
        self._run = run
        self._ticks = threading.Thread(target=self._tick, daemon=True)
        self._ticks.start()

    def started(self) -> None:
        self._say(f"[{self._run.place}/{len(self._run.stages)}] {self._run.name}, {in_words(self._run.left())}")

    def advanced(self) -> None:
        """Told by the next line."""

    def close(self) -> None:
        self._closed.set()
        self._ticks.join()

    def _say(self, line: str) -> None:
        with self._lock:
            self._write(line)
            self._last = time.monotonic()

    def _tick(self) -> None:
        while not self._closed.wait(max(0.1 * self._between, self._last + self._between - time.monotonic())):
            if self._run.place and time.monotonic() - self._last >= 0.9 * self._between:
                run = self._run
                steps = f"{run.done} of {run.total}, " if run.total else ""
                so_far = f"{duration(run.seconds_in_stage())} so far"
                self._say(f"[{run.place}/{len(run.stages)}] {run.name}: {steps}{so_far}, {in_words(run.left())}")


class Bars:
    """A bar for the stage that runs, below lines for those that are over; in a terminal, or in a notebook.

    Args:
        console: Of rich.
    """

    def __init__(self, console: Any) -> None:
        self._console = console
        self._task: Any = None

    def open(self, run: Run) -> None:
        from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn
        from rich.text import Text

        class Told(ProgressColumn):
            """Steps, seconds, and the time left for the whole run."""

            def render(self, task: Any) -> Text:
                if task.finished_time is not None or task.id != told._task:
                    return Text(duration(task.fields["took"]))
                steps = f"{run.done} of {run.total}, " if run.total else ""
                return Text(f"{steps}{duration(run.seconds_in_stage())}, {in_words(run.left())}")

        told, self._run = self, run
        columns = TextColumn("{task.description}", markup=False), BarColumn(bar_width=20), Told()
        self._bars = Progress(*columns, console=self._console)
        self._bars.start()

    def started(self) -> None:
        self._end_stage()
        run = self._run
        self._began = time.monotonic()
        self._task = self._bars.add_task(
            f"[{run.place}/{len(run.stages)}] {run.name}", total=run.total or None, took=0.0
        )
        self._bars.refresh()  # with the time left, however short the stage is

    def advanced(self) -> None:
        self._bars.update(self._task, completed=self._run.done, total=self._run.total)

    def close(self) -> None:
        self._end_stage()
        self._bars.stop()

    def _end_stage(self) -> None:
        if self._task is not None:
            took = time.monotonic() - self._began
            self._bars.update(self._task, total=1, completed=1, took=took)
            self._task = None


_current: ContextVar[tuple[Run, Sequence[Display]] | None] = ContextVar("run", default=None)


@contextmanager
def shown(stages: Sequence[str], displays: Callable[[], Sequence[Display]]) -> Iterator[None]:
    """Show the stages of what is done inside; within a run that is shown already, they are stages of that.

    Args:
        stages: As for `Run`.
        displays: Makes what shows them, where this is the outermost run.
    """
    if _current.get() is not None:
        yield
        return
    run, opened = Run(stages), list(displays())
    for display in opened:
        display.open(run)
    before = _current.set((run, opened))
    try:
        yield
    finally:
        _current.reset(before)
        for display in reversed(opened):
            display.close()


def begin(name: str, steps: int = 0) -> None:
    """The run goes on to its stage of this name, if it has one, or has more steps to do in it.

    Args:
        name: Of the stage.
        steps: That `advance` counts; 0 for none.
    """
    current = _current.get()
    if current is not None and current[0].name == name:
        current[0].total += steps
    elif current is not None and current[0].start(name, steps):
        for display in current[1]:
            display.started()


def advance() -> None:
    """One step more of the stage is done."""
    current = _current.get()
    if current is not None and current[0].total > current[0].done:
        current[0].done += 1
        for display in current[1]:
            display.advanced()


def steps(name: str, items: Sequence[_T]) -> Iterator[_T]:
    """The items, each a step of a stage of this name."""
    begin(name, len(items))
    for item in items:
        yield item
        advance()


def expect(seconds: Mapping[str, float] | Callable[[], Mapping[str, float]]) -> None:
    """Tell what stages are expected to take; what was told of others before stays.

    Args:
        seconds: By name; or finds them out, where somebody is shown the run.
    """
    current = _current.get()
    if current is not None and current[1]:
        current[0].expected.update(seconds() if callable(seconds) else seconds)


def duration(seconds: float) -> str:
    """`45 s`, `3 min 20 s`, `2 h 5 min`."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 1:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{rest} s"
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def in_words(left: float | None) -> str:
    """How long the rest of a run takes."""
    return "time left not known yet" if left is None else f"about {duration(max(left, 1.0))} left"
