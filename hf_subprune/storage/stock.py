"""Which config values, if any, build the widths that a pruned model has.

A structural search with no table of names: a number of the config is a candidate if scaling it by the ratio of a
pruned size to the full one gives a valid number, and it is taken if the skeleton it builds is nearer to the model.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache

from transformers import LlamaPreTrainedModel, PreTrainedConfig, PreTrainedModel, logging

from ..models.forwards import INNER_WIDTH
from .skeleton import Key, Size, Sizes, build_skeleton, nested_configs, read_back, sizes
from .spec import LayoutSpec

Change = tuple[str, str, int | float]
"""Path of a config inside the model's (`""`: the model's own), name of a value in it, new value."""


@dataclass(frozen=True)
class StockSearch:
    """What `find_stock_config` found.

    Args:
        config: Builds exactly the widths of the model; None if there is none.
        reason: The values that say them, or what no value says.
        advice: What to do instead, if `config` is None.
    """

    config: PreTrainedConfig | None
    reason: str
    advice: str = ""


def find_stock_config(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, spec: LayoutSpec, wanted: Sizes
) -> StockSearch:
    """Search for a config that builds the tensor shapes of a pruned model and the numbers that pruning changed.

    Greedy descent by one config value at a time, or by two where one alone gains nothing (a head count whose head size
    must be written out too). Each try builds one skeleton on meta. Numbers that pruning left alone may change with the
    config all the same (Llama's MLP holds an `intermediate_size` that nothing reads), so they only decide between
    candidates; whether the forward minds them is for a comparison of outputs.

    Args:
        model_class: Of the pruned model.
        config: Of the pruned model, as it was before pruning.
        spec: How the model differs from what its config builds.
        wanted: Sizes of the pruned model.
    """
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # what configs have to say about values that are only tried
    try:
        return _Search(model_class, config, spec, wanted).run()
    finally:
        logging.set_verbosity(verbosity)


@dataclass(frozen=True)
class _Start:
    """A config from which others are tried, equal to every other that says the same.

    Args:
        model_class: That is built from it.
        text: The config as JSON.
        attention: The kernels that it chooses, which JSON leaves out.
        noted: Path of a module, and name of a value of the module's config: numbers that are looked at as well.
        config: Read only.
        spec: That names them.
    """

    model_class: type[PreTrainedModel]
    text: str
    attention: str | None
    noted: tuple[Key, ...]
    config: PreTrainedConfig = field(compare=False)
    spec: LayoutSpec = field(compare=False)

    @classmethod
    def of(cls, model_class: type[PreTrainedModel], config: PreTrainedConfig, spec: LayoutSpec) -> _Start:
        noted = ((path, name) for path, values in spec.attributes.items() for name in values if "." in name)
        text, config = config.to_json_string(use_diff=False), copy.deepcopy(config)
        return cls(model_class, text, config._attn_implementation, tuple(noted), config, spec)

    def changed(self, changes: Iterable[Change]) -> PreTrainedConfig:
        config = copy.deepcopy(self.config)
        parts = dict(nested_configs(config))
        for path, name, value in changes:
            setattr(parts[path], name, value)
        return config


@dataclass(frozen=True, eq=False)
class _Attempt:
    """A config with some values changed.

    Args:
        start: Where they are changed; of an attempt that was read back, what it came to.
        changes: Of values.
        sizes: That it builds.
        refusal: Why it would not build or load; `""` if it does.
    """

    start: _Start
    changes: tuple[Change, ...]
    sizes: dict[Key, Size]
    refusal: str = ""

    def __str__(self) -> str:
        return ", ".join(f"{path}.{name}={value:g}".removeprefix(".") for path, name, value in self.changes)


@lru_cache(maxsize=256)
def _attempt(start: _Start, changes: tuple[Change, ...]) -> _Attempt:
    """A skeleton is built for its sizes; one search after the other asks for the same of them.

    Configs and constructors refuse values with errors of every type, hence the broad `except`.
    """
    try:
        built = build_skeleton(start.model_class, start.changed(changes))
        return _Attempt(start, changes, sizes(built, start.spec).every)
    except Exception as error:
        return _Attempt(start, changes, {}, _in_words(error))


def _in_words(error: Exception) -> str:
    return " ".join(str(error.__cause__ or error).split()).rstrip(".") or type(error).__name__


class _Search:
    def __init__(self, model_class: type[PreTrainedModel], config: PreTrainedConfig, spec: LayoutSpec, wanted: Sizes):
        self.model_class, self.spec, self.pruned, self.wanted = model_class, spec, wanted, wanted.every
        self.current = _attempt(_Start.of(model_class, config, spec), ())
        changed = {(path, name) for path, names in spec.modules.items() for name in names}
        changed |= {(path, name) for path, values in spec.attributes.items() for name in values}
        unchanged = {key for key in self.wanted if self.current.sizes.get(key) == self.wanted[key]}
        self.binding = changed | (unchanged & wanted.tensors.keys())
        """Sizes that the config must build."""
        self.telling = changed | unchanged
        """Sizes by which candidates are compared."""

    def run(self) -> StockSearch:
        name = type(self.current.start.config).__name__
        if uneven := self._uneven():
            return StockSearch(None, f"{name} says one width for all layers, but {uneven}", "Use layout='ragged'")
        if adapted := self._adapted():
            return StockSearch(None, f"no value of {name} adapts the forward of {adapted!r}", "Use layout='ragged'")
        taken = []
        while wrong := self._wrong(self.current, self.binding):
            nearer = self._nearer()
            step = next((attempt for attempt in nearer if not attempt.refusal), None)
            if step is None:
                path, leaf = key = min(wrong)
                sizes = f"{self.wanted[key]} instead of {self.current.sizes[key]}"
                reason = f"no value of {name} builds {path}.{leaf} of {sizes}"
                if nearer:
                    reason = f"{name} refuses {nearer[0]}: {nearer[0].refusal}"
                return StockSearch(None, reason, self._advice(refused=bool(nearer)))
            taken.append(str(step))
            self.current = step
        return StockSearch(copy.deepcopy(self.current.start.config), ", ".join(taken))

    def _advice(self, refused: bool) -> str:
        advice = "Exclude that block, keep a width that the config can say, or use layout='ragged'"
        if refused and issubclass(self.model_class, LlamaPreTrainedModel):
            advice += (
                ". Or save the weights as Mistral, the same network with any number of heads: "
                "hf_subprune.storage.recast.as_mistral(model, inputs).save_pretrained(folder)"
            )
        return advice

    def _nearer(self) -> list[_Attempt]:
        """Attempts that are nearer to the pruned model than the current config, the nearest first."""
        wrong = self._wrong(self.current, self.binding)
        singles: list[_Attempt] = []
        for attempt in self._attempts((change,) for change in self._candidates(wrong)):
            singles.append(attempt)
            if not self._wrong(attempt, self.telling):
                found = self._improving([attempt])
                if found and not found[0].refusal:
                    return found  # none is nearer
        if nearer := self._improving(singles):
            return nearer
        heeded = [attempt for attempt in singles if attempt.sizes != self.current.sizes]
        reaching = [
            attempt.changes[0]
            for attempt in heeded
            if any(attempt.sizes.get(key) != self.current.sizes[key] for key in wrong)
        ]
        pairs = [
            (head_size, attempt.changes[0])
            for head_size, attempt in itertools.product(self._head_sizes(), heeded)
            if head_size[0] == attempt.changes[0][0]
        ]
        pairs += [pair for pair in itertools.combinations(reaching, 2) if pair[0][:2] != pair[1][:2]]
        return self._improving(self._attempts(pairs))

    def _improving(self, attempts: Iterable[_Attempt]) -> list[_Attempt]:
        """Those that are nearer than the current config, also as they come back from disk, the nearest first."""
        limit = len(self._wrong(self.current, self.telling))
        nearer = [attempt for attempt in attempts if len(self._wrong(attempt, self.telling)) < limit]
        loaded = [self._read_back(attempt) for attempt in nearer]
        distances = {attempt: len(self._wrong(attempt, self.telling)) for attempt in loaded}
        return sorted((attempt for attempt in loaded if distances[attempt] < limit), key=distances.__getitem__)

    def _attempts(self, proposals: Iterable[tuple[Change, ...]]) -> Iterator[_Attempt]:
        """Change the current config and build skeletons; proposals from which no model can be built are left out."""
        attempts = (_attempt(self.current.start, changes) for changes in proposals)
        return (attempt for attempt in attempts if not attempt.refusal)

    def _read_back(self, attempt: _Attempt) -> _Attempt:
        """`attempt` as its config loads, or with the refusal of its config."""
        try:
            config = read_back(attempt.start.changed(attempt.changes))
        except Exception as error:
            return replace(attempt, refusal=_in_words(error))
        loaded = _attempt(_Start.of(self.model_class, config, self.spec), ())
        if loaded.refusal:
            return replace(attempt, refusal=loaded.refusal)
        return replace(loaded, changes=attempt.changes)

    def _candidates(self, wrong: set[Key]) -> list[Change]:
        """Config values scaled as the wrong sizes are, and unset ones at the pruned size; those of a wrong size first.

        Never `head_dim`: heads are removed whole, and half the heads must not be mistaken for heads of half the size.
        """
        pairs = [(self.current.sizes[key], self.wanted[key]) for key in wrong]
        ratios = sorted({ratio for sizes in pairs for ratio in zip(*sizes, strict=True) if ratio[0] != ratio[1]})
        changes: list[Change] = []
        for path, part in nested_configs(self.current.start.config):
            for name, value in vars(part).items():
                if name.startswith("_") or name.endswith("_id") or name == "head_dim":
                    continue
                for old, new in ratios:
                    if value is None:
                        changes.append((path, name, new))
                    elif type(value) is int and value > 0 and value * new % old == 0:
                        changes.append((path, name, value * new // old))
                    elif type(value) is float and value >= 1:
                        changes.append((path, name, value * new / old))
        parts, sizes = dict(nested_configs(self.current.start.config)), {old for old, _ in ratios}
        return sorted(dict.fromkeys(changes), key=lambda change: getattr(parts[change[0]], change[1]) not in sizes)

    def _head_sizes(self) -> list[Change]:
        """`head_dim` written out where a config leaves it to be `hidden_size / heads`, which fewer heads change."""
        held = [value for (_, name), (value,) in self.pruned.numbers.items() if name == "head_dim"]
        values = sorted({value for value in held if type(value) is int})
        parts = nested_configs(self.current.start.config)
        unset = [path for path, part in parts if vars(part).get("head_dim") is None]
        return [(path, "head_dim", value) for path in unset for value in values]

    def _wrong(self, attempt: _Attempt, keys: set[Key]) -> set[Key]:
        return {key for key in keys if attempt.sizes.get(key) != self.wanted[key]}

    def _adapted(self) -> str:
        """A module whose forward was adapted to the units that it has left; `""` if there is none."""
        widths = (path for path, values in self.spec.attributes.items() if INNER_WIDTH in values)
        return next(iter([*widths, *self.spec.arguments, *self.spec.bypassed]), "")

    def _uneven(self) -> str:
        """Two layers of one kind, alike before pruning, that keep different widths; `""` if there are none."""
        seen: dict[tuple[str, Size], tuple[str, Size]] = {}
        for (path, leaf), shape in self.pruned.tensors.items():
            parts = [*path.split("."), leaf] if path else [leaf]
            name = ".".join(parts)
            lists = self.pruned.lists
            kind = ".".join("*" if ".".join(parts[:i]) in lists else part for i, part in enumerate(parts))
            other, other_shape = seen.setdefault((kind, self.current.sizes.get((path, leaf), shape)), (name, shape))
            if shape != other_shape:
                return f"{other} is {other_shape} and {name} is {shape}"
        return ""
