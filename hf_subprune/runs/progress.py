"""What a run shows while it works, and what it took: bars, and wall time of stages."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from transformers.utils import logging

from .processes import state

_T = TypeVar("_T")


@contextmanager
def progress(total: int, description: str, *, quiet: bool = False) -> Iterator[Any]:
    """A bar on the main process, on a terminal only; `transformers.utils.logging.disable_progress_bar` hides it."""
    hidden = True if quiet or not state().is_main_process else None
    with logging.tqdm(total=total, desc=description, disable=hidden) as bar:
        yield bar


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
