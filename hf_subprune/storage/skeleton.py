"""The model that a config builds, without its weights, and how a pruned model differs from it."""

import copy
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init

from ..models.forwards import BYPASSED, CUT_ARGUMENTS, INNER_WIDTH
from .entry import ENTRY
from .spec import LayoutSpec, adaptations

Key = tuple[str, str]
"""Module path, name of a tensor or of a number that the module holds."""

Size = tuple[int | float, ...]
"""Shape of a tensor, or `(value,)` of a number."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model, or of one that a config would build.

    Args:
        tensors: Shapes of all parameters and buffers, tied ones under each of their names.
        numbers: All numbers that modules hold.
        lists: Paths of its `ModuleList`s.
    """

    tensors: dict[Key, Size]
    numbers: dict[Key, Size]
    lists: frozenset[str]

    @property
    def every(self) -> dict[Key, Size]:
        """All sizes."""
        return self.tensors | self.numbers


def sizes(model: PreTrainedModel, spec: LayoutSpec) -> Sizes:
    """Sizes of a model; the numbers of its layers' configs are those that `spec` names."""
    numbers: dict[Key, Size] = {}
    for path, module in model.named_modules():
        values = {name: value for name, value in vars(module).items() if type(value) in (int, float)}
        for name in spec.attributes.get(path, {}):
            if name.startswith("config."):
                values[name] = getattr(module.config, name.removeprefix("config."))
        numbers |= {(path, name): (value,) for name, value in values.items()}
    shapes: dict[Key, Size] = {}
    for name, tensor in tensors(model).items():
        path, _, leaf = name.rpartition(".")
        shapes[path, leaf] = tuple(tensor.shape)
    lists = (path for path, module in model.named_modules() if isinstance(module, nn.ModuleList))
    return Sizes(shapes, numbers, frozenset(lists))


def describe(model: PreTrainedModel) -> LayoutSpec:
    """The tensors and integer attributes of `model` that are smaller than its config says.

    Holds whatever pruned the model, and for a model pruned again. Tensors tied under several names appear under all
    of them. What is larger than the config says (a cache that grew in a forward) is not a matter of pruning.
    """
    built = build_skeleton(type(model), model.config)
    mine = tensors(model)
    shapes = {
        name: tuple(mine[name].shape)
        for name, expected in tensors(built).items()
        if name in mine and _is_smaller(mine[name].shape, expected.shape)
    }
    attributes: dict[str, dict[str, int]] = {}
    arguments: dict[str, dict[str, tuple[int, int, int]]] = {}
    bypassed: dict[str, tuple[str, int]] = {}
    expected_modules = dict(built.named_modules())
    shared = _shared_configs(model)
    for path, module in model.named_modules():
        if path in expected_modules:
            smaller = _smaller_integers(vars(module), vars(expected_modules[path]))
            config = vars(module).get("config")
            if isinstance(config, PreTrainedConfig) and id(config) not in shared:
                own = _smaller_integers(vars(config), vars(expected_modules[path].config))
                smaller |= {f"config.{name}": value for name, value in own.items()}
            if not vars(module).keys().isdisjoint((INNER_WIDTH, CUT_ARGUMENTS, BYPASSED)):
                width, cut, how = adaptations(module)
                smaller |= width
                if cut:
                    arguments[path] = cut
                if how is not None:
                    bypassed[path] = how
            if smaller:
                attributes[path] = smaller
    return LayoutSpec(shapes, attributes, arguments, bypassed)


def build_skeleton(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """The model that `from_pretrained` builds from `config` before it reads weights: on meta, weights not yet tied."""
    config = copy.deepcopy(config)
    for _, part in nested_configs(config):
        for name in (ENTRY, "quantization_config"):
            vars(part).pop(name, None)
    with torch.device("meta"), init.meta_device_safe_creation_ops(), init.no_init_weights(), init.no_tie_weights():
        return model_class(config)


def nested_configs(config: PreTrainedConfig, path: str = "") -> Iterator[tuple[str, PreTrainedConfig]]:
    """`config` under the path `""`, then every config inside it under its dotted path."""
    yield path, config
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            yield from nested_configs(value, f"{path}.{name}" if path else name)


def read_back(config: PreTrainedConfig) -> PreTrainedConfig:
    """`config` as it comes back from disk, validated as saving and building validate it.

    Raises whatever the config class raises for values that it does not accept.
    """
    config.validate()
    decoded = config._decode_special_floats(json.loads(config.to_json_string()))
    read = type(config).from_dict(decoded)
    for (_, mine), (_, theirs) in zip(nested_configs(config), nested_configs(read), strict=True):
        for name, value in vars(mine).items():
            if name.endswith("_implementation_internal"):  # a choice of kernels, which is not saved
                setattr(theirs, name, value)
    return read


def _shared_configs(model: PreTrainedModel) -> set[int]:
    """Identities of the configs that models in `model` hold; a layer with a head count of its own holds another."""
    models = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    return {id(config) for part in models for _, config in nested_configs(part.config)}


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by name, tied ones under each of their names."""
    named = dict(model.named_parameters(remove_duplicate=False))
    return {**named, **dict(model.named_buffers(remove_duplicate=False))}


def _is_smaller(shape: torch.Size, expected: torch.Size) -> bool:
    return (
        len(shape) == len(expected)
        and shape != expected
        and all(size <= limit for size, limit in zip(shape, expected, strict=True))
    )


def _smaller_integers(values: Mapping[str, Any], expected: Mapping[str, Any]) -> dict[str, int]:
    """Integers of `values` that are below those of the same name in `expected`."""
    return {
        name: value
        for name, value in values.items()
        if type(value) is int and type(expected.get(name)) is int and value < expected[name]
    }
