"""Which config values, if any, build the widths that a pruned model has.

A structural search with no table of names: a number of the config is a candidate if scaling it by the ratio of a
pruned size to the full one gives a valid number, and it is taken if the skeleton it builds is nearer to the model.
"""

import copy
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

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


@dataclass(frozen=True, eq=False)
class _Attempt:
    """A config with some values changed, the sizes that it builds, and why it would not load, if so."""

    config: PreTrainedConfig
    changes: tuple[Change, ...]
    sizes: dict[Key, Size]
    refusal: str = ""

    def __str__(self) -> str:
        return ", ".join(f"{path}.{name}={value:g}".removeprefix(".") for path, name, value in self.changes)


class _Search:
    def __init__(self, model_class: type[PreTrainedModel], config: PreTrainedConfig, spec: LayoutSpec, wanted: Sizes):
        self.model_class, self.spec, self.pruned, self.wanted = model_class, spec, wanted, wanted.every
        self.current = _Attempt(config, (), self._built(config))
        changed = {(path, name) for path, names in spec.modules.items() for name in names}
        changed |= {(path, name) for path, values in spec.attributes.items() for name in values}
        unchanged = {key for key in self.wanted if self.current.sizes.get(key) == self.wanted[key]}
        self.binding = changed | (unchanged & wanted.tensors.keys())
        """Sizes that the config must build."""
        self.telling = changed | unchanged
        """Sizes by which candidates are compared."""

    def run(self) -> StockSearch:
        name = type(self.current.config).__name__
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
        return StockSearch(self.current.config, ", ".join(taken))

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
        """Change the current config and build skeletons; proposals from which no model can be built are left out.

        Configs and constructors refuse values with errors of every type, hence the broad `except`.
        """
        for changes in proposals:
            config = copy.deepcopy(self.current.config)
            parts = dict(nested_configs(config))
            try:
                for path, name, value in changes:
                    setattr(parts[path], name, value)
                built = self._built(config)
            except Exception:
                continue
            yield _Attempt(config, changes, built)

    def _read_back(self, attempt: _Attempt) -> _Attempt:
        """`attempt` as its config loads, or with the refusal of its config."""
        try:
            config = read_back(attempt.config)
            built = self._built(config)
        except Exception as error:
            refusal = " ".join(str(error.__cause__ or error).split()).rstrip(".")
            return replace(attempt, refusal=refusal)
        return replace(attempt, config=config, sizes=built)

    def _candidates(self, wrong: set[Key]) -> list[Change]:
        """Config values scaled as the wrong sizes are, and unset ones at the pruned size; those of a wrong size first.

        Never `head_dim`: heads are removed whole, and half the heads must not be mistaken for heads of half the size.
        """
        pairs = [(self.current.sizes[key], self.wanted[key]) for key in wrong]
        ratios = sorted({ratio for sizes in pairs for ratio in zip(*sizes, strict=True) if ratio[0] != ratio[1]})
        changes: list[Change] = []
        for path, part in nested_configs(self.current.config):
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
        parts, sizes = dict(nested_configs(self.current.config)), {old for old, _ in ratios}
        return sorted(dict.fromkeys(changes), key=lambda change: getattr(parts[change[0]], change[1]) not in sizes)

    def _head_sizes(self) -> list[Change]:
        """`head_dim` written out where a config leaves it to be `hidden_size / heads`, which fewer heads change."""
        held = [value for (_, name), (value,) in self.pruned.numbers.items() if name == "head_dim"]
        values = sorted({value for value in held if type(value) is int})
        unset = [path for path, part in nested_configs(self.current.config) if vars(part).get("head_dim") is None]
        return [(path, "head_dim", value) for path in unset for value in values]

    def _wrong(self, attempt: _Attempt, keys: set[Key]) -> set[Key]:
        return {key for key in keys if attempt.sizes.get(key) != self.wanted[key]}

    def _built(self, config: PreTrainedConfig) -> dict[Key, Size]:
        """Sizes that a config builds."""
        return sizes(build_skeleton(self.model_class, config), self.spec).every

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
