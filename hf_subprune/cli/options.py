"""Options of the commands: their types, how a model is loaded, and one option per field of `PruneConfig`."""

import functools
import inspect as introspection
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ..config import TARGETS, PruneConfig, choices_of, field_help
from .help import WHOLE

DATA, SIZE, METHOD, RUN, RESULT = "Data", "How small", "How it is pruned", "How it runs", "Result"
"""Panels of the help."""

Model = Annotated[str, typer.Argument(help="Local folder or Hub id of a model.", metavar="MODEL")]
_SOURCE = (
    "Hub data set, id or id:config; a .txt, .jsonl, .csv or .parquet file; or a folder of these, of images or of "
    "sounds."
)
Data = Annotated[
    list[str],
    typer.Option(help=f"{_SOURCE} Several are a mixture, SOURCE=WEIGHT.", metavar="SOURCE", rich_help_panel=DATA),
]
Mixture = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        metavar="SOURCE",
        help="Hub data set, file, or folder; several are a mixture.",
        rich_help_panel=DATA,
        show_default=False,
    ),
]
WHOLE["data"] = f"{_SOURCE} Given several times, a mixture; SOURCE=WEIGHT says how often samples of each come up."
Split = Annotated[
    str | None,
    typer.Option(
        help="Split of a Hub data set or a folder, such as test; train, or the first one, when left out.",
        rich_help_panel=DATA,
    ),
]
Column = Annotated[
    str | None,
    typer.Option(
        help="Column to read, 'first,second' for pairs of sentences; found when left out.", rich_help_panel=DATA
    ),
]
DataFree = Annotated[
    bool,
    typer.Option("--data-free", help="Instead: text that the language model makes up.", rich_help_panel=DATA),
]
Columns = Annotated[
    str | None, typer.Option("--column", help="Column to read, 'first,second' for sts; found by its type if left out.")
]
TaskName = Annotated[
    Literal["classification", "sts", "perplexity", "embedding-drift", "transcription"] | None,
    typer.Option(
        "--task",
        help="Score on labelled data; sts by Spearman's correlation, transcription by word errors.",
        rich_help_panel="Task",
    ),
]
MetricName = Annotated[
    str | None,
    typer.Option(
        "--metric",
        help="In place of the task's own: 'package.module:function', the path of a metric module of `evaluate`, or "
        "the id of one on the Hub (needs a network).",
        rich_help_panel="Task",
    ),
]
Label = Annotated[
    str | None,
    typer.Option("--label", help="Column of labels; label, labels or score if left out.", rich_help_panel="Task"),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show no progress.", rich_help_panel=RUN)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, nothing else.", rich_help_panel=RESULT)]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace an earlier result in DIR.", rich_help_panel=RESULT)
]

_KEEP_FORMS = "a fraction such as 0.5, or one for each kind of units, mlp=0.5,attention=0.75"

# Fields of the config that `prune --help` shows: where, and in how many words. `--help-all` shows all that the field's
# documentation says.
_SHORT = {
    "samples": (DATA, "Unlabeled samples to fit on."),
    "max_length": (DATA, "Tokens of a sample."),
    "keep": (SIZE, "Fraction to keep: 0.5, mlp=0.5,attention=0.75, or several sizes, 0.75 0.5."),
    "params": (SIZE, "Or: parameters of the whole model."),
    "macs": (SIZE, "Or: multiply-accumulates, fraction or number."),
    "latency": (SIZE, "Or: fraction of the latency here and now."),
    "size": (SIZE, "Or: of the weights, '500 MB in bf16'."),
    "units": (METHOD, "What may be removed: mlp attention, channels, experts."),
    "layout": (METHOD, "stock loads without this package."),
    "budget": (METHOD, "Who keeps how much."),
    "variant": (METHOD, "What new weights are fitted to."),
    "exclude": (METHOD, "Patterns of blocks to leave whole."),
}
_PLACES = {"held_out": DATA, "packing": DATA, "batch_size": RUN, "skip_unreadable": DATA, "seed": RUN}
_WORDS = {"keep": "FRACTION", "params": "NUMBER", "macs": "NUMBER", "latency": "FRACTION", "size": "SIZE"}
_WORDS |= {"units": "KIND", "include": "PATTERN", "exclude": "PATTERN", "remove": "PATTERN", "shrinkage": "NUMBER"}
_WORDS |= {"round_to": "NUMBER"}

_Expanded = dict[str, Any]


def _rare(help: str, *names: str) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=RUN, hidden=True)


_LOADING: _Expanded = {
    "device": Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1, mps; found when left out.", rich_help_panel=RUN)
    ],
    "dtype": Annotated[
        Literal["auto", "float32", "bfloat16", "float16"] | None,
        _rare("Weights are loaded in this dtype; auto, when left out, keeps the saved one."),
    ],
    "device_map": Annotated[
        str | None, _rare("As for `from_pretrained`: auto, balanced, sequential, a device, or a map as JSON.")
    ],
    "revision": Annotated[str | None, _rare("Branch, tag or commit of the model on the Hub.")],
    "subfolder": Annotated[str | None, _rare("Folder inside of the model's repo or folder.")],
    "token": Annotated[
        str | None, _rare("For the Hub; the one that `hf auth login` or HF_TOKEN stores when left out.")
    ],
    "trust_remote_code": Annotated[
        bool | None, _rare("Run code that comes with the model: read it first.", "--trust-remote-code")
    ],
    "attn_implementation": Annotated[str | None, _rare("As for `from_pretrained`: eager, sdpa, ...")],
}


def loading_options(command: Callable[..., None]) -> Callable[..., None]:
    """Replace the parameter `loading` of a command by the options of how a model is loaded.

    The command gets the arguments of `data.datafiles.load_model` that were given.
    """
    return _expanded(command, "loading", _LOADING, _loading)


def _loading(given: Mapping[str, Any]) -> dict[str, Any]:
    found = {name: value for name, value in given.items() if value is not None}
    if str(found.get("device_map", "")).startswith("{"):
        found["device_map"] = json.loads(found["device_map"])
    if "device" in found and "device_map" in found:
        raise ValueError("--device places all of the model, --device-map its parts: give one of them.")
    own: dict[str, Any] = {name: found.pop(name) for name in ("device", "dtype") if name in found}
    return {**own, "options": found}


def config_options(command: Callable[..., None]) -> Callable[..., None]:
    """Replace the parameter `configs` of a command by `--config FILE` and one option per `PruneConfig` field.

    `--keep` may be repeated: there is one config for each.
    """
    return _expanded(command, "configs", _config_parameters(), _configs)


def _expanded(
    command: Callable[..., None], name: str, options: _Expanded, assembled: Callable[[dict[str, Any]], Any]
) -> Callable[..., None]:
    """The command with options, all left out by default, for one of its parameters, which is what they come to."""

    @functools.wraps(command)
    def wrapped(**given: Any) -> None:
        chosen = {option: given.pop(option, None) for option in options}
        command(**{name: assembled(chosen)}, **given)

    signature = introspection.signature(command)
    kept = [
        p.replace(kind=introspection.Parameter.KEYWORD_ONLY) for p in signature.parameters.values() if p.name != name
    ]
    added = [
        introspection.Parameter(option, introspection.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        for option, annotation in options.items()
    ]
    wrapped.__signature__ = signature.replace(parameters=[*kept, *added])  # type: ignore[attr-defined]
    wrapped.__annotations__ = {p.name: p.annotation for p in [*kept, *added]}
    return wrapped


def _config_parameters() -> _Expanded:
    """`--config` and an option for each field."""
    file = typer.Option(
        "--config",
        help="JSON or YAML file of these options.",
        metavar="FILE",
        rich_help_panel=METHOD,
        show_default=False,
    )
    options: _Expanded = {}
    WHOLE["config_file"] = "JSON or YAML file of a PruneConfig; the other options override it."
    help_of = field_help()
    for spec in sorted(fields(PruneConfig), key=lambda spec: _order(spec.name)):
        whole = help_of.get(spec.name, "")
        if spec.name == "keep":
            whole += f" Here: {_KEEP_FORMS}. Several values, 0.75 0.5, make several sizes."
        WHOLE[spec.name] = whole
        panel, short = _SHORT.get(spec.name, (_PLACES.get(spec.name, METHOD), whole))
        option = typer.Option(
            help=short,
            show_default=_shown_default(spec.name, spec.default),
            rich_help_panel=panel,
            metavar=_WORDS.get(spec.name),
            hidden=spec.name not in _SHORT,
        )
        options[spec.name] = Annotated[_type(spec.name, spec.default) | None, option]
    return {**options, "config_file": Annotated[Path | None, file]}


def _order(name: str) -> int:
    return list(_SHORT).index(name) if name in _SHORT else len(_SHORT)


def _type(name: str, default: Any) -> Any:
    """What an option takes: one of some words, a number, or text that is parsed later."""
    if choices := choices_of(name):
        return Literal[choices]
    if name in ("keep", "units"):
        return list[str]
    return type(default) if type(default) in (bool, int) else str


def _shown_default(name: str, default: Any) -> Any:
    if isinstance(default, tuple):
        return " ".join(default) or False
    if default is None:
        return "0.5" if name == "keep" else False
    return str(default)


def _parse(name: str, text: str) -> Any:
    """An option's text as the value of a `PruneConfig` field."""
    if name == "keep":
        return _parse_keep(text)
    default = getattr(PruneConfig, name)
    if isinstance(default, tuple):
        return _parts(text)
    if name == "packing":
        return {"true": True, "false": False}.get(text.lower(), text)
    if name in ("macs", "latency", "shrinkage", "params", "round_to", "size"):
        for number in (int, float):
            try:
                return number(text)
            except ValueError:
                pass
    return text


def _parts(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


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


def _configs(given: dict[str, Any]) -> list[PruneConfig]:
    """One config for each value of `--keep`, of the file and the options over it; what was left out is `None`."""
    config_file, keeps, units = given.pop("config_file"), given.pop("keep"), given.pop("units")
    base = PruneConfig.from_pretrained(config_file).to_dict() if config_file else {}
    changed = {
        name: _parse(name, value) if isinstance(value, str) else value
        for name, value in given.items()
        if value is not None
    }
    if units:
        changed["units"] = tuple(kind for text in units for kind in _parts(text))
    sizes: Sequence[dict[str, Any]] = [{"keep": _parse("keep", text)} for text in keeps or ()]
    if sizes or set(TARGETS) & set(changed):  # a target given here replaces that of the file
        base = {name: value for name, value in base.items() if name not in TARGETS}
    return [PruneConfig.from_dict({**base, **changed, **size}) for size in sizes or [{}]]
