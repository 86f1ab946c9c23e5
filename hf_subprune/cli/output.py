"""What a command prints: the stages that it goes through on standard error, its result, and nothing else, on standard
output.
"""

import json
import logging
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from ..runs.stages import Bars, Display, Lines, begin, shown

STARTING = "Importing torch and Transformers"

# Of several processes, one speaks.
_SILENT = int(os.environ.get("RANK", "0")) > 0
# In a pipe, tables are as wide as what they hold.
_PIPE_WIDTH = 400

# They say by these, before they are imported, what is no business of who runs a command; whoever asks to be told is.
_VERBOSITY = ("TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY", "DATASETS_VERBOSITY")
_LOUD = ("accelerate", "datasets", "httpx", "huggingface_hub", "torch", "torchao", "transformers")


def console() -> Console:
    """Where results go. Names and messages may hold brackets, which are no markup."""
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else _PIPE_WIDTH
    return Console(quiet=_SILENT, markup=False, emoji=False, width=width)


def give(*parts: Any) -> None:
    """Print a result: tables, or a line that a terminal may wrap."""
    for part in parts:
        shown = console()
        if isinstance(part, Table):  # a name that is longer than a line is left to the terminal to break
            shown.width = max(
                shown.width, Measurement.get(shown, shown.options.update_width(_PIPE_WIDTH), part).minimum
            )
        shown.print(part, soft_wrap=isinstance(part, str))


def give_json(values: Mapping[str, Any]) -> None:
    """Print a result as one object of JSON."""
    if not _SILENT:
        print(json.dumps(values, indent=2))


@contextmanager
def running(stages: Sequence[str], quiet: bool = False) -> Iterator[None]:
    """A command goes through stages, of which the first one brings in what is heavy.

    Args:
        stages: Behind `STARTING`.
        quiet: Whether nothing is shown.
    """
    with shown((STARTING, *stages), lambda: [] if quiet or _SILENT else [_display()]):
        begin(STARTING)
        import torch  # noqa: F401

        logging.getLogger("torch").setLevel(logging.ERROR)
        import transformers  # noqa: F401

        yield


def _display() -> Display:
    seen = Console(stderr=True)
    return Bars(seen) if seen.is_terminal and not seen.is_dumb_terminal else Lines(_write)


def _write(line: str) -> None:
    sys.stderr.write(f"{line}\n")  # at once, where others write there too
    sys.stderr.flush()


def silence_libraries() -> None:
    """What libraries warn of stays away, and so do their bars: this process belongs to the command."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    for name in _VERBOSITY:
        os.environ.setdefault(name, "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for name in _LOUD:
        logging.getLogger(name).setLevel(logging.ERROR)


def command_line() -> str:
    """The command that is running, to be copied into a report; what `--token` was given is left out."""
    words = list(sys.argv[1:])
    for place, word in enumerate(words):
        if word.startswith("--token="):
            words[place] = "--token=..."
        elif place and words[place - 1] == "--token":
            words[place] = "..."
    return shlex.join(["hf-subprune", *words])


def reported(run: Callable[[], object]) -> None:
    """Run a command: what the user can mend is one line, without a traceback.

    Raises:
        SystemExit: with 1, the command failed.
    """
    try:
        run()
    except (ValueError, TypeError, OSError, ImportError) as error:
        from rich.text import Text

        from ..report.plain import printable

        errors = Console(stderr=True)
        message = Text.assemble(("Error:", "red"), " " + printable(str(error), keep="\n"))
        errors.print(message, soft_wrap=not errors.is_terminal)  # in a pipe, no name is broken
        raise SystemExit(1) from error
