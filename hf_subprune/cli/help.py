"""Help that is short with `--help` and whole with `--help-all`, and several values behind one option."""

import re
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ..config import UNIT_KINDS

_NUMBER = re.compile(r"\d*\.?\d+")

# Options that take several words, and which words these are.
_SEVERAL: dict[str, Callable[[str], bool]] = {
    "--keep": lambda word: _NUMBER.fullmatch(word) is not None,
    "--units": lambda word: set(word.split(",")) <= set(UNIT_KINDS),
}

WHOLE: dict[str, str] = {}
"""Help of parameters, by name, that `--help` has in short."""


def repeated(words: Sequence[str]) -> list[str]:
    """`--keep 0.75 0.5` as `--keep 0.75 --keep 0.5`, which is how an option takes several values."""
    spelled: list[str] = []
    option = ""
    for word in words:
        if option and word != option and _SEVERAL[option](word):
            spelled += [word] if spelled[-1] == option else [option, word]
            continue
        option = word if word in _SEVERAL else ""
        spelled.append(word)
    return spelled


class Commands(TyperGroup):
    """The commands, reading several values behind one option."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, repeated(args))


def _show_all(ctx: typer.Context, asked: bool) -> None:
    if not asked:
        return
    for parameter in ctx.command.params:
        shown = vars(parameter)
        shown.update(hidden=False, help=WHOLE.get(parameter.name or "", shown.get("help")))
    ctx.command.format_help(ctx, ctx.make_formatter())
    raise typer.Exit


HelpAll = Annotated[
    bool,
    typer.Option(
        "--help-all", help="Show every option and exit.", is_eager=True, callback=_show_all, expose_value=False
    ),
]
