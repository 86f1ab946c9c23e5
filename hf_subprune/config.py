"""What the user asks for: one strict dataclass, saved as sorted JSON."""

import inspect
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import yaml

CONFIG_NAME = "subprune_config.json"

UNIT_KINDS = ("mlp", "attention", "channels", "experts")
VARIANTS = ("layer", "seq", "asym", "residual")
TWO_STREAMS = ("asym", "residual")
"""Variants with targets of the original model and inputs of the pruned one."""
LAYOUTS = ("auto", "stock", "ragged")
IMPORTANCES = ("greedy", "random", "weight_norm", "activation_gradient", "wanda", "fluctuation")
METHODS = ("auto", "greedy", "backward", "stochastic")
BUDGETS = ("auto", "global", "equal_loss", "uniform")
TARGETS = ("keep", "params", "macs", "latency", "size")

_UNITS_OF_SIZE = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmg]?i?b)(?:\s+in\s+(bf16|fp16|fp32))?\s*", flags=re.IGNORECASE)


@dataclass(frozen=True)
class Rule:
    """What a field of `PruneConfig` accepts, kept in its annotation: `name: Annotated[type, rule] = default`.

    Args:
        allowed: The accepted values in words, said by the error.
        types: The accepted types; `bool` passes for no number.
        accepts: Whether a value of the right type is in range.
        choices: The accepted values, where they are a few words.
    """

    allowed: str
    types: tuple[type, ...]
    accepts: Callable[[Any], bool]
    choices: tuple[str, ...] = ()

    def check(self, name: str, value: Any) -> Any:
        """The value as it is stored: lists become tuples, dicts are copied.

        Raises:
            ValueError: the value is out of range or not one of the known ones.
            TypeError: the value has the wrong type.
        """
        if isinstance(value, list):
            value = tuple(value)
        message = f"PruneConfig.{name} takes {self.allowed}; got {value!r}"
        if not isinstance(value, self.types) or (isinstance(value, bool) and bool not in self.types):
            raise TypeError(f"{message} of type {type(value).__name__}.")
        try:
            accepted = self.accepts(value)
        except TypeError as error:
            raise TypeError(f"{message}.") from error
        if not accepted:
            raise ValueError(f"{message}.")
        return dict(value) if isinstance(value, dict) else value


def _one_of(choices: tuple[str, ...]) -> Rule:
    return Rule(f"one of {', '.join(map(repr, choices))}", (str,), lambda value: value in choices, choices)


def _whole(minimum: int) -> Rule:
    return Rule(f"a whole number, {minimum} or more", (int,), lambda value: value >= minimum)


def _is_fraction(value: Any) -> bool:
    return not isinstance(value, bool) and 0 < value <= 1


def _is_keep(value: Any) -> bool:
    if isinstance(value, dict):
        return len(value) > 0 and set(value) <= set(UNIT_KINDS) and all(map(_is_fraction, value.values()))
    return _is_fraction(value)


def _is_size(value: Any) -> bool:
    return value > 0 if isinstance(value, int) else _SIZE.fullmatch(value) is not None and parse_size(value)[0] > 0


def _optional(rule: Rule) -> Rule:
    return Rule(f"{rule.allowed}, or None", (*rule.types, type(None)), lambda v: v is None or rule.accepts(v))


def parse_size(size: int | str) -> tuple[int, str | None]:
    """Bytes and dtype (`"bf16"`, `"fp16"`, `"fp32"`, or `None` for the model's own) of the config's `size`."""
    if isinstance(size, int):
        return size, None
    number, unit, dtype = _SIZE.fullmatch(size).groups()  # type: ignore[union-attr]
    return int(float(number) * _UNITS_OF_SIZE[unit.lower()]), dtype and dtype.lower()


def _is_shrinkage(value: Any) -> bool:
    return value == "auto" if isinstance(value, str) else 0 <= value < math.inf


_KINDS = ", ".join(map(repr, UNIT_KINDS))
_KEEP = Rule(f"a fraction in (0, 1], or a dict of one fraction per unit kind ({_KINDS})", (int, float, dict), _is_keep)
_UNITS = Rule(
    f"one or more of {_KINDS}",
    (tuple,),
    lambda value: len(value) > 0 and set(value) <= set(UNIT_KINDS) and len(set(value)) == len(value),
)
_MACS = Rule(
    "a fraction in (0, 1], or a number of multiply-accumulates above 1", (int, float), lambda v: 0 < v < math.inf
)
_SIZES = Rule("a number of bytes, or text such as '500 MB' or '0.5 GiB in bf16'", (int, str), _is_size)
_FRACTION = Rule("a fraction in (0, 1]", (int, float), _is_fraction)
_SHRINKAGE = Rule("'auto' or a finite number, 0 or more", (str, int, float), _is_shrinkage)
_PACKING = Rule("'auto', True or False", (str, bool), lambda value: value in ("auto", True, False))
_SWITCH = Rule("True or False", (bool,), lambda value: True)
_PATTERNS = Rule(
    "a tuple of block name patterns, such as ('encoder.layer.0.*',)",
    (tuple,),
    lambda value: all(isinstance(pattern, str) and pattern for pattern in value),
)


@dataclass
class PruneConfig:
    """How to prune a model. Every value is checked on construction and on assignment.

    Args:
        keep (`float` or `dict[str, float]`, default `0.5`):
            Fraction, in (0, 1], of the prunable blocks' parameters to keep; or one fraction per unit kind,
            `{"mlp": 0.5, "attention": 0.75}`, where a kind left out is kept whole. Where whole experts go besides
            other units it is such a dict, whose other fractions are of what is left then. `None` when another target
            is set: exactly one of `keep`, `params`, `macs`, `latency` and `size` says how small the model is to be.
            It is met from below: what blocks keep is within 0.5% of what they may, where steps of a unit are as fine;
            by budget `"uniform"`, or with `round_to`, within one rounding step; a latency within 6%.
        units (`tuple[str, ...]`, default `("mlp", "attention")`):
            Which kinds of units may be removed: `"mlp"` (neurons), `"attention"` (heads; under grouped-query
            attention, key/value heads with all of their query heads, or as many query heads of each of them, whichever
            loses less), `"channels"` (of convolutions; a speech model depends on its first ones more than their
            parameters count for) and `"experts"` (whole experts of mixture-of-experts layers, as many in each layer,
            before anything else is removed; always chosen on the original model).
        variant (`str`, default `"residual"`):
            The reweighting objective: the paper's `"layer"` (LayerInChange), `"seq"` (SeqInChange) or `"asym"`
            (AsymInChange), or `"residual"`: `asym` for the sum that the output goes into, so that later layers mend
            what earlier ones have done to the residual stream (`"layer"` where `reweight` is off). `"layer"` is the
            fastest, at half of the forwards, and several sizes share its moments.
        layout (`str`, default `"auto"`):
            How the pruned model is stored. `"stock"`: equal widths in every layer, loads without this package;
            `"ragged"`: widths differ by layer; `"auto"`: stock where the architecture's config can say the widths,
            which budget `"auto"` chooses so that it can, unless the size is out of reach then.
        budget (`str`, default `"auto"`):
            Who keeps how much. `"global"`: every block the width at which the predicted drift of the model's output
            is least; `"equal_loss"`: the smallest widths at which no block alone loses more than a common amount
            (Kuzmin et al.); `"uniform"`: the same fraction everywhere; `"auto"`: `"global"`. By `"auto"` with layout
            `"auto"`, and by any but `"uniform"` with layout `"stock"`, all layers get one width for each number that
            the model's config has: of neurons (those of an encoder and a decoder are two in some), of key/value
            heads, of query heads. What is shared out is how much goes to each; blocks for which the config has no
            number, as BERT's heads, stay whole. By `"auto"` with layout `"auto"`, layers get widths of their own
            where the size is out of reach otherwise. Where they do by `"global"`, a sublayer without a bias that is
            missed least for what it costs may keep no unit at all.
        params (`int`, default `None`):
            Target: parameters of the whole model.
        macs (`float`, default `None`):
            Target: multiply-accumulates of the whole model, as a fraction (up to 1) or absolute, on one sample of the
            length that the report states.
        latency (`float`, default `None`):
            Target: fraction of the latency measured here and now, on the batch that the report states.
        size (`int` or `str`, default `None`):
            Target: bytes of the saved weights, or text such as `"500 MB"` or `"500 MB in bf16"`.
        samples (`int`, default `128`):
            Number of unlabeled samples to fit on.
        held_out (`int`, default `32`):
            Number of further samples, never fitted on, that the report measures output drift on. When the data holds
            fewer than `samples + held_out`, a fifth of what there is is held out (at least one sample).
        max_length (`int`, default `256`):
            Tokens a text sample is truncated to; fewer where the model or its tokenizer takes fewer.
        packing (`bool` or `"auto"`, default `"auto"`):
            Join plain texts, for causal language models, and cut them into windows of `max_length` tokens, so that
            none is padding and less of long texts is cut. `"auto"` does so where most texts are longer than that, and
            where shorter ones fill as many windows as samples are asked for.
        batch_size (`int`, default `16`):
            Most samples in one calibration batch; few samples make smaller ones, so that both folds have some.
        importance (`str`, default `"greedy"`):
            What units are chosen by: `"greedy"` maximises the paper's objective; the baselines score units one by one:
            `"random"`, `"weight_norm"` (LayerWeightNorm), `"activation_gradient"` (LayerActGrad, of a function of the
            output that needs no labels), `"wanda"` (weight norm times activation norm), `"fluctuation"` (FLAP).
        method (`str`, default `"auto"`):
            How importance `"greedy"` searches: forward `"greedy"`, `"backward"` elimination, `"stochastic"` greedy, or
            `"auto"`: backward where few units go, else forward.
        swaps (`int`, default `-1`):
            Most exchanges of a kept and a removed unit that refine a selection; `-1` until none improves it.
        reweight (`bool`, default `True`):
            Compute new weights for the layer that follows the removed units. `False` only removes.
        shrinkage (`"auto"` or `float`, default `"auto"`):
            Strength of the pull of the new weights towards the original ones, as a multiple of the mean squared
            activation (dimensionless, >= 0). `"auto"` chooses it per block by cross-fitting.
        loss_aware (`bool`, default `True`):
            Choose units by what their loss does to the model's output rather than to the block's: errors are weighted
            by a label-free Fisher or Gauss-Newton matrix, from backwards over a part of the samples.
        round_to (`int`, default `None`):
            Widths of MLP blocks are rounded down to a multiple of this many units (never below one multiple; blocks
            that have fewer units are not rounded). By default, where all layers get one width, the first of 64, 8 and
            1 that comes within 0.5% of the target; of 8 and 1 where they do not; 64 by budget `"uniform"`. 1 where
            blocks are too small.
        include (`tuple[str, ...]`, default `()`):
            Patterns (`fnmatch`) of block names; when given, only matching blocks are pruned.
        exclude (`tuple[str, ...]`, default `()`):
            Patterns (`fnmatch`) of block names that are left whole.
        remove (`tuple[str, ...]`, default `()`):
            Patterns (`fnmatch`) of the names of blocks that keep no unit: their sublayers are gone, and where those of
            a whole layer are, so is the layer. What is left of the budget is shared out among the others.
        skip_unreadable (`bool`, default `False`):
            Pass over samples that cannot be read, with a warning each, instead of an error that names the first one.
        seed (`int`, default `0`):
            Seed of the shuffling of streamed data and of every random choice.

    Raises:
        ValueError: a value is unknown or out of range; the message lists what is allowed.
        TypeError: a value has the wrong type.
    """

    keep: Annotated[float | dict[str, float] | None, _optional(_KEEP)] = None
    units: Annotated[tuple[str, ...], _UNITS] = ("mlp", "attention")
    variant: Annotated[str, _one_of(VARIANTS)] = "residual"
    layout: Annotated[str, _one_of(LAYOUTS)] = "auto"
    budget: Annotated[str, _one_of(BUDGETS)] = "auto"
    params: Annotated[int | None, _optional(_whole(1))] = None
    macs: Annotated[float | None, _optional(_MACS)] = None
    latency: Annotated[float | None, _optional(_FRACTION)] = None
    size: Annotated[int | str | None, _optional(_SIZES)] = None
    samples: Annotated[int, _whole(1)] = 128
    held_out: Annotated[int, _whole(1)] = 32
    max_length: Annotated[int, _whole(1)] = 256
    packing: Annotated[bool | str, _PACKING] = "auto"
    batch_size: Annotated[int, _whole(1)] = 16
    importance: Annotated[str, _one_of(IMPORTANCES)] = "greedy"
    method: Annotated[str, _one_of(METHODS)] = "auto"
    swaps: Annotated[int, _whole(-1)] = -1
    reweight: Annotated[bool, _SWITCH] = True
    shrinkage: Annotated[float | str, _SHRINKAGE] = "auto"
    loss_aware: Annotated[bool, _SWITCH] = True
    round_to: Annotated[int | None, _optional(_whole(1))] = None
    include: Annotated[tuple[str, ...], _PATTERNS] = ()
    exclude: Annotated[tuple[str, ...], _PATTERNS] = ()
    remove: Annotated[tuple[str, ...], _PATTERNS] = ()
    skip_unreadable: Annotated[bool, _SWITCH] = False
    seed: Annotated[int, _whole(0)] = 0

    def __post_init__(self) -> None:
        if all(getattr(self, name) is None for name in TARGETS):
            self.keep = 0.5
        self.target()
        if isinstance(self.keep, dict) and (missing := sorted(self.keep.keys() - set(self.units))):
            raise ValueError(
                f"PruneConfig: keep says how much of {', '.join(missing)} to keep, but units holds "
                f"{', '.join(self.units)} only: add {', '.join(missing)} to units, or take it out of keep."
            )

    @classmethod
    def of(cls, config: "PruneConfig | Mapping[str, Any] | None") -> "PruneConfig":
        """The config itself, that of a dict of its fields, or the default one for `None`.

        Raises:
            TypeError: it is something else.
        """
        if config is None or isinstance(config, Mapping):
            return cls.from_dict(dict(config or {}))
        if not isinstance(config, cls):
            raise TypeError(f"`config` must be a PruneConfig or a dict of its fields, not {type(config).__name__}.")
        return config

    def target(self) -> str:
        """Name of the field that says how small the model is to be.

        Raises:
            ValueError: several are set.
        """
        given = [name for name in TARGETS if getattr(self, name) is not None]
        if len(given) != 1:
            values = ", ".join(f"{name}={getattr(self, name)!r}" for name in given) or "none"
            raise ValueError(f"PruneConfig takes exactly one of {', '.join(TARGETS)}; got {values}.")
        return given[0]

    def allocation(self) -> str:
        """The budget that `"auto"` stands for, else `budget`."""
        return "global" if self.budget == "auto" else self.budget

    def is_even(self) -> bool:
        """Whether all layers are to have one width, which the config of the model says, if it can."""
        return self.allocation() != "uniform" and (self.layout == "stock" or self.layout == self.budget == "auto")

    def streams(self) -> str:
        """The variant whose moments are collected: `"residual"` is `"layer"` where no new weights mend anything."""
        return "layer" if self.variant == "residual" and not self.reweight else self.variant

    def reads_sensitivities(self, curves: bool) -> bool:
        """Whether errors are weighed by what the output is sensitive to: in curves, and in greedy selection."""
        return self.loss_aware and (curves or self.importance == "greedy")

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _RULES:
            raise AttributeError(f"PruneConfig has no field {name!r}. Fields: {', '.join(_RULES)}.")
        super().__setattr__(name, _RULES[name].check(name, value))

    def to_dict(self) -> dict[str, Any]:
        """Every field as JSON holds it: tuples as lists, dicts copied."""
        values = asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "PruneConfig":
        """The config of a dict; fields left out take their defaults.

        Raises:
            ValueError: a key is not a field, or a value is out of range.
            TypeError: a value has the wrong type.
        """
        if unknown := sorted(map(str, set(values) - set(_RULES))):
            raise ValueError(f"PruneConfig has no field {', '.join(map(repr, unknown))}. Fields: {', '.join(_RULES)}.")
        return cls(**values)

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write `subprune_config.json` into `folder`, which is made if missing, and return the file's path."""
        path = Path(folder) / CONFIG_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n", encoding="utf-8")
        return path

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "PruneConfig":
        """Read a config from a folder that holds `subprune_config.json`, or from a JSON or YAML file.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file holds no mapping of known fields to allowed values.
            TypeError: a value has the wrong type.
        """
        file = Path(path)
        if file.is_dir():
            file = file / CONFIG_NAME
        if not file.is_file():
            raise FileNotFoundError(f"No pruning config at {file}: give a folder that holds {CONFIG_NAME}, or a file.")
        try:
            text = file.read_text(encoding="utf-8")
            values = yaml.safe_load(text) if file.suffix in (".yaml", ".yml") else json.loads(text)
        except (UnicodeDecodeError, json.JSONDecodeError, yaml.YAMLError) as error:
            raise ValueError(f"The pruning config {file} is corrupted, save it again: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"The pruning config {file} must hold fields and values, got {type(values).__name__}.")
        try:
            return cls.from_dict(values)
        except (TypeError, ValueError) as error:
            raise type(error)(f"In the pruning config {file}: {error}") from error


_RULES: dict[str, Rule] = {
    name: hint.__metadata__[0] for name, hint in get_type_hints(PruneConfig, include_extras=True).items()
}


def choices_of(name: str) -> tuple[str, ...]:
    """The words that a field of `PruneConfig` takes; empty where it takes something else."""
    return _RULES[name].choices


def field_help() -> dict[str, str]:
    """What each field of `PruneConfig` means, as one paragraph of its docstring; empty under `python -OO`."""
    arguments = inspect.getdoc(PruneConfig) or ""
    arguments = arguments.partition("Args:\n")[2].partition("\nRaises:")[0]
    entries = re.findall(r"^    (\w+) \(.*?\):\n((?:^        .*\n?)+)", arguments, flags=re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}
