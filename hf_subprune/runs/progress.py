"""Who is shown what a run does, where nobody else decides; and the wall time of its stages."""

import logging as levels
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TypeVar

from rich.console import Console
from transformers.utils import logging

from .processes import state
from .stages import Bars, Display, Lines

_T = TypeVar("_T")

# Below the logger of Transformers, whose verbosity decides.
logger = logging.get_logger("transformers.hf_subprune")


def displays() -> list[Display]:
    """What shows a run in Python, on the main process: Transformers' logger, at INFO, and bars.

    Bars come in a terminal, and in a notebook that has `ipywidgets`, unless they are switched off by
    `transformers.utils.logging.disable_progress_bar`.
    """
    if not state().is_main_process:
        return []
    found: list[Display] = [Lines(logger.info)] if logger.isEnabledFor(levels.INFO) else []
    console = Console(stderr=True)
    seen = console.is_terminal or (console.is_jupyter and find_spec("ipywidgets") is not None)
    return [*found, Bars(console)] if seen and logging.is_progress_bar_enabled() else found


class Clock:
    """Wall time of named stages, added up in `seconds`."""

    def __init__(self, seconds: Mapping[str, float] | None = None) -> None:
        self.seconds = dict(seconds or {})

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


def timed(steps: Iterator[_T], clock: Clock, stage: str) -> Iterator[_T]:
    """The steps, their making timed; none is held on to."""
    while True:
        with clock(stage):
            step = next(steps, None)
        if step is None:
            return
        yield step
        del step
