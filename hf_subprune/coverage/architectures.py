"""Which classes of the installed Transformers belong to a configuration class."""

import importlib
from functools import cache
from typing import Any

from transformers import CONFIG_MAPPING, MODEL_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

# Heads in the order in which one is taken for a type's main head: what the type is used for first, pretraining last.
MAIN_HEADS = (
    "MASKED_LM",
    "CAUSAL_LM",
    "SEQ_TO_SEQ_CAUSAL_LM",
    "IMAGE_TEXT_TO_TEXT",
    "MULTIMODAL_LM",
    "SPEECH_SEQ_2_SEQ",
    "CTC",
    "IMAGE_CLASSIFICATION",
    "OBJECT_DETECTION",
    "SEMANTIC_SEGMENTATION",
    "UNIVERSAL_SEGMENTATION",
    "DEPTH_ESTIMATION",
    "VIDEO_CLASSIFICATION",
    "AUDIO_CLASSIFICATION",
    "ZERO_SHOT_IMAGE_CLASSIFICATION",
    "PRETRAINING",
)


def model_types() -> list[str]:
    """All model types of the installed Transformers, sorted."""
    return sorted(CONFIG_MAPPING.keys())


def model_class(config_class: type[PreTrainedConfig], head: str) -> type[PreTrainedModel] | None:
    """The class of a configuration's bare model (`head="base"`) or of its main head (`"main"`), None if it has none.

    Raises:
        ValueError: If `head` is neither.
    """
    if head == "base":
        if config_class in MODEL_MAPPING:
            return first(MODEL_MAPPING[config_class])
        return next(iter(own_classes(config_class)), None)
    if head != "main":
        raise ValueError(f'head is "base" or "main", got {head!r}')
    for mapping in head_mappings():
        if config_class in mapping:
            found = first(mapping[config_class])
            return None if found is model_class(config_class, "base") else found
    return None


def first(classes: Any) -> type[PreTrainedModel]:
    """An auto mapping names one class, or several of which the first is the usual one."""
    return classes[0] if isinstance(classes, tuple) else classes


@cache
def head_mappings() -> tuple:
    """The auto mappings of heads, the main ones first."""
    names = [f"MODEL_FOR_{head}_MAPPING" for head in MAIN_HEADS]
    others = sorted(n for n in vars(modeling_auto) if n.startswith("MODEL_FOR_") and n.endswith("_MAPPING"))
    return tuple(
        getattr(modeling_auto, name) for name in dict.fromkeys(names + others) if hasattr(modeling_auto, name)
    )


def own_classes(config_class: type[PreTrainedConfig]) -> list[type[PreTrainedModel]]:
    """Model classes that name `config_class` as theirs, the shortest name first (the one with the least around it)."""
    source = config_class.__module__.replace(".configuration_", ".modeling_")
    try:
        module = importlib.import_module(source)
    except ImportError:
        return []
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, PreTrainedModel)
        and value.__module__ == source
        and getattr(value, "config_class", None) is config_class
        and "forward" in vars(value)
    ]
    return sorted(found, key=lambda cls: ("For" in cls.__name__, len(cls.__name__)))
