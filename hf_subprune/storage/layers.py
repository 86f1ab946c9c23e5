"""Layers that have become idle, taken out of a model whose config can say how many are left."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..models.linears import linear_of
from ..models.paths import ancestors_of
from ..models.running import hooked, undisturbed
from .skeleton import build_skeleton, nested_configs, read_back


@dataclass(frozen=True, eq=False)
class Shortened:
    """A model without its idle layers.

    Args:
        config: Says how many layers there are now; the model's own is as it was.
        reason: The values that say it, and which layers went.
        undo: Puts the layers back.
    """

    config: PreTrainedConfig
    reason: str
    undo: Callable[[], None]


def without_idle_layers(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Shortened | None:
    """Take out the layers that hand on what they are given, in each stack of layers whose length the config says.

    Layers that are left get the numbers that they have in a model which that config builds.

    Args:
        model: Shortened in place, but for its configs; as it was if `None` is returned.
        inputs: Keyword arguments of a forward.
    """
    config, reasons, undos = model.config, [], []
    for path, idle in _idle_layers(model, inputs).items():
        found = _shorter(type(model), config, path, len(_layers(model, path)), idle)
        if found is not None:
            shorter, reason = found
            undo = _take_out(
                model, path, idle, build_skeleton(type(model), config), build_skeleton(type(model), shorter)
            )
            if undo is not None:
                config = shorter
                undos.append(undo)
                reasons.append(reason)

    def undo_all() -> None:
        for undo in reversed(undos):
            undo()

    return Shortened(config, ", ".join(reasons), undo_all) if undos else None


def _layers(model: nn.Module, path: str) -> nn.ModuleList:
    layers = model.get_submodule(path)
    assert isinstance(layers, nn.ModuleList)
    return layers


def _idle_layers(model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, list[int]]:
    """By path of a list of layers, those that lost all units of a block and return the very tensor values they get."""
    lists = [path for path, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outer = [path for path in lists if not any(above in lists for above in ancestors_of(path)[:-1])]
    layers = {
        f"{path}.{name}": (path, int(name))
        for path in outer
        for name, layer in model.get_submodule(path).named_children()
        if any(_is_empty(module) for module in layer.modules())
    }
    if not layers:
        return {}
    given: dict[str, Any] = {}
    same: dict[str, bool] = {}

    def remember(layer: str) -> Callable[[Any], None]:
        return lambda value: given.update({layer: value})

    def compare(layer: str) -> Callable[[Any], None]:
        def compared(output: Any) -> None:
            first = output[0] if isinstance(output, tuple) and output else output
            tensors = isinstance(first, torch.Tensor) and isinstance(given[layer], torch.Tensor)
            same[layer] = same.get(layer, True) and tensors and torch.equal(first, given[layer])

        return compared

    watched = [[(layer, make(layer)) for layer in layers] for make in (remember, compare)]
    with undisturbed(model), torch.no_grad(), hooked(model, inputs=watched[0], outputs=watched[1]):
        model(**inputs)
    idle: dict[str, list[int]] = {}
    for layer in layers:
        if same.get(layer, False):
            path, number = layers[layer]
            idle.setdefault(path, []).append(number)
    return {path: numbers for path, numbers in idle.items() if len(numbers) < len(_layers(model, path))}


def _is_empty(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return linear_of(module) is not None and weight is not None and weight.numel() == 0


def _shorter(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, path: str, length: int, idle: Sequence[int]
) -> tuple[PreTrainedConfig, str] | None:
    """A config that builds one list of layers without the idle ones, and all others as before; and what says so.

    Some number that is the length of the list is lowered; lists beside it that are as long lose the same entries.
    """
    lengths = _lengths(build_skeleton(model_class, config))
    wanted = {**lengths, path: length - len(idle)}
    for part, name in _counts(config, length):
        changed = copy.deepcopy(config)
        values = dict(nested_configs(changed))[part]
        try:
            for other, value in list(vars(values).items()):
                if isinstance(value, (list, tuple)) and len(value) == length:
                    setattr(values, other, [one for number, one in enumerate(value) if number not in idle])
            setattr(values, name, length - len(idle))
            changed = read_back(changed)
            built = _lengths(build_skeleton(model_class, changed))
        except Exception:  # configs and constructors refuse values with errors of every type
            continue
        if built == wanted:
            gone = ", ".join(map(str, idle))
            return changed, f"{name} is {length - len(idle)}: layers {gone} of {path!r} add nothing and are gone"
    return None


def _counts(config: PreTrainedConfig, length: int) -> Iterator[tuple[str, str]]:
    for path, part in nested_configs(config):
        for name, value in vars(part).items():
            if type(value) is int and value == length and not name.startswith("_"):
                yield path, name


def _lengths(model: nn.Module) -> dict[str, int]:
    """Of the outermost lists of layers."""
    lists = {path: len(module) for path, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    return {path: n for path, n in lists.items() if not any(above in lists for above in ancestors_of(path)[:-1])}


def _take_out(
    model: nn.Module, path: str, idle: Sequence[int], before: nn.Module, after: nn.Module
) -> Callable[[], None] | None:
    """Take idle layers out and number the others anew, as skeletons before and after are numbered.

    Returns:
        What puts them back; `None`, and nothing is changed, where others would not be what the skeleton has there.
    """
    layers = _layers(model, path)
    kept = [number for number in range(len(layers)) if number not in idle]
    renumbered: list[tuple[dict[str, Any], str, int, int]] = []
    for new, old in enumerate(kept):
        mine = dict(layers[old].named_modules())
        theirs, ours = (dict(_layers(model, path)[at].named_modules()) for model, at in ((before, old), (after, new)))
        if not theirs.keys() == ours.keys() <= mine.keys():
            return None
        for name, module in theirs.items():
            for key, value in vars(module).items():
                other = vars(ours[name]).get(key)
                if isinstance(value, (int, float, str, type(None))) and value != other:
                    if type(value) is not int or (value, other) != (old, new) or vars(mine[name]).get(key) != old:
                        return None
                    renumbered.append((mine[name].__dict__, key, old, new))
    entries = dict(layers._modules)
    layers._modules = {str(new): entries[str(old)] for new, old in enumerate(kept)}
    for held, key, _, new in renumbered:
        held[key] = new

    def undo() -> None:
        layers._modules = entries
        for held, key, old, _ in renumbered:
            held[key] = old

    return undo
