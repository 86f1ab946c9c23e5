"""Call a function on many items, each in a process of its own, so that a crash or a hang costs one item."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

GRACE = 5.0
"""Seconds that a process has to end after it gave its result."""


def isolated(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    failed: Callable[[Item, str], Result],
    *,
    seconds: float,
    workers: int,
    preload: Sequence[str] = (),
) -> Iterator[Result]:
    """Results of `function` in the order of `items`.

    Args:
        function: Importable from its module; items and results can be pickled.
        items: One call each.
        failed: Makes the result of an item whose process died or ran out of time, from a sentence that says so.
        seconds: Time that one item may take.
        workers: Processes at a time.
        preload: Modules that are imported once, before the processes are forked.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, function.__module__, *preload])

    def call(item: Item) -> Result:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_send_result, args=(sender, function, item), daemon=True)
        process.start()
        sender.close()
        try:
            if not receiver.poll(seconds):
                return failed(item, f"no result after {seconds:.0f} s")
            result = receiver.recv()
            process.join(GRACE)
            return result
        except EOFError:
            process.join()
            return failed(item, f"its process ended with exit code {process.exitcode}")
        finally:
            process.kill()
            process.join()
            receiver.close()

    with ThreadPoolExecutor(workers) as pool:
        yield from pool.map(call, items)


def _send_result(sender: Connection, function: Callable[[Any], Any], item: Any) -> None:
    # What models print while they are built or run is not for the reader of a survey.
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    sender.send(function(item))
    sender.close()
