"""Options of the commands: their types, one option per field of `PruneConfig`, and several values of `--keep`."""

import functools
import inspect as introspection
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ..config import TARGETS, PruneConfig, field_help

Model = Annotated[str, typer.Argument(help="Local folder or Hub id of a model.", metavar="MODEL")]
_SOURCE = (
    "Hub data set, id or id:config; a .txt, .jsonl, .csv or .parquet file; or a folder of these, of images or of "
    "sounds."
)
Data = Annotated[str, typer.Option(help=_SOURCE)]
Mixture = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        help=f"{_SOURCE} Given several times, a mixture; SOURCE=WEIGHT says how often samples of each come up. Or "
        "--data-free.",
    ),
]
Split = Annotated[
    str | None,
    typer.Option(help="Split of a Hub data set or a folder, such as test; train, or the first one, when left out."),
]
Column = Annotated[
    str | None, typer.Option(help="Column to read, 'first,second' for pairs of sentences; found when left out.")
]
DataFree = Annotated[
    bool, typer.Option("--data-free", help="In place of --data: text that MODEL, a language model, makes up itself.")
]
Columns = Annotated[
    str | None, typer.Option("--column", help="Column to read, 'first,second' for sts; found by its type if left out.")
]
TaskName = Annotated[
    str | None,
    typer.Option(
        "--task",
        help="classification, sts (Spearman), perplexity, transcription (word errors) or embedding-drift; none when "
        "left out.",
    ),
]
MetricName = Annotated[
    str | None,
    typer.Option(
        "--metric",
        help="In place of the task's own: 'package.module:function', the path of a metric module of `evaluate`, or "
        "the id of one on the Hub (needs a network).",
    ),
]
Label = Annotated[str | None, typer.Option("--label", help="Column of labels; label, labels or score if left out.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bars.")]
Dtype = Annotated[str, typer.Option(help="Weights are loaded in this dtype; 'auto' keeps the saved one.")]

_NUMBER = re.compile(r"\d*\.?\d+")
_KEEP_FORMS = "a fraction such as 0.5, or one for each kind of units, mlp=0.5,attention=0.75"


def _repeated(arguments: Sequence[str]) -> list[str]:
    """`--keep 0.75 0.5` as `--keep 0.75 --keep 0.5`, which is how an option takes several values."""
    spelled: list[str] = []
    in_keep = False
    for argument in arguments:
        in_keep = argument == "--keep" or (in_keep and _NUMBER.fullmatch(argument) is not None)
        if in_keep and argument != "--keep" and spelled[-1] != "--keep":
            spelled.append("--keep")
        spelled.append(argument)
    return spelled


class Commands(TyperGroup):
    """The commands, reading several values behind one `--keep`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, _repeated(args))


def _parse(name: str, text: str) -> Any:
    """An option's text as the value of a `PruneConfig` field."""
    if name == "keep":
        return _parse_keep(text)
    default = getattr(PruneConfig, name)
    if isinstance(default, tuple):
        return tuple(part.strip() for part in text.split(",") if part.strip())
    if name == "packing":
        return {"true": True, "false": False}.get(text.lower(), text)
    if name in ("macs", "latency", "shrinkage", "params", "round_to", "size"):
        for number in (int, float):
            try:
                return number(text)
            except ValueError:
                pass
    return text


def _parse_keep(text: str) -> float | dict[str, float]:
    """`0.5`, `mlp=0.5,attention=0.75` or `{"mlp": 0.5, "attention": 0.75}`."""
    try:
        if text.lstrip().startswith("{"):
            return dict(json.loads(text))
        if "=" in text:
            pairs = [part.partition("=") for part in text.split(",")]
            return {kind.strip(): float(value) for kind, _, value in pairs}
        return float(text)
    except ValueError as error:
        raise ValueError(f"--keep takes {_KEEP_FORMS}; got {text!r}.") from error


def config_options(command: Callable[..., None]) -> Callable[..., None]:
    """Replace the parameter `configs` of a command by `--config FILE` and one option per `PruneConfig` field.

    `--keep` may be repeated: there is one config for each.
    """
    options = _config_parameters()

    @functools.wraps(command)
    def wrapped(**given: Any) -> None:
        chosen = {option.name: given.pop(option.name, None) for option in options}
        command(configs=_configs(chosen), **given)

    signature = introspection.signature(command)
    kept = [
        p.replace(kind=introspection.Parameter.KEYWORD_ONLY)
        for p in signature.parameters.values()
        if p.name != "configs"
    ]
    wrapped.__signature__ = signature.replace(parameters=[*kept, *options])  # type: ignore[attr-defined]
    wrapped.__annotations__ = {p.name: p.annotation for p in [*kept, *options]}
    return wrapped


def _config_parameters() -> list[introspection.Parameter]:
    """`--config` and an option for each field, all left out by default, as parameters of a command."""
    file = typer.Option("--config", help="JSON or YAML file of a PruneConfig; the options below override it.")
    options: dict[str, Any] = {"config_file": Annotated[Path | None, file]}
    help_of = field_help()
    for spec in fields(PruneConfig):
        plain: Any = type(spec.default) if type(spec.default) in (bool, int) else str
        text = help_of.get(spec.name, "")
        if spec.name == "keep":
            plain = list[str]
            text += f" Here: {_KEEP_FORMS}. Several values, 0.75 0.5, make several sizes."
        shown = spec.default if not isinstance(spec.default, tuple) else ",".join(spec.default)
        if spec.default is None:
            shown = "0.5 without another target" if spec.name == "keep" else ""
        option = typer.Option(help=text, show_default=str(shown) or "none")
        options[spec.name] = Annotated[plain | None, option]
    return [
        introspection.Parameter(name, introspection.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        for name, annotation in options.items()
    ]


def _configs(given: dict[str, Any]) -> list[PruneConfig]:
    """One config for each value of `--keep`, of the file and the options over it; what was left out is `None`."""
    config_file, keeps = given.pop("config_file"), given.pop("keep")
    base = PruneConfig.from_pretrained(config_file).to_dict() if config_file else {}
    changed = {
        name: _parse(name, value) if isinstance(value, str) else value
        for name, value in given.items()
        if value is not None
    }
    sizes = [{"keep": _parse("keep", text)} for text in keeps or ()]
    if sizes or set(TARGETS) & set(changed):  # a target given here replaces that of the file
        base = {name: value for name, value in base.items() if name not in TARGETS}
    return [PruneConfig.from_dict({**base, **changed, **size}) for size in sizes or [{}]]
