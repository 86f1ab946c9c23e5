"""Saving a pruned Llama in the stock layout with a number of heads that its own config refuses."""

from collections.abc import Mapping
from typing import Any

import transformers
from transformers import LlamaPreTrainedModel, MistralConfig, PreTrainedModel

from .layout import choose_layout, difference, outputs
from .skeleton import build_skeleton, tensors


def as_mistral(model: LlamaPreTrainedModel, inputs: Mapping[str, Any]) -> PreTrainedModel:
    """The Mistral class of the same task over the tensors of `model` (shared, not copied), in the stock layout.

    Mistral without a sliding window is the network of Llama, and its config takes any number of heads, where Llama's
    takes divisors of `hidden_size`.

    Args:
        model: A Llama whose layers all have the same widths.
        inputs: Keyword arguments of a forward on which both models must give the same outputs, difference 0.0.

    Returns:
        A model to be saved in place of `model`.

    Raises:
        ValueError: Widths differ between layers; no Mistral class has this task; the model has biases, or something
            else that Mistral has not.
    """
    name = type(model).__name__.replace("Llama", "Mistral")
    model_class = getattr(transformers, name, None)
    if not isinstance(model, LlamaPreTrainedModel) or model_class is None:
        raise ValueError(f"{type(model).__name__} has no counterpart in Mistral: use layout='ragged'")
    known = vars(MistralConfig())
    values = {key: value for key, value in vars(model.config).items() if key in known and not key.startswith("_")}
    values |= {"sliding_window": None, "architectures": [name], "id2label": model.config.id2label}
    twin = build_skeleton(model_class, MistralConfig(**values))
    mine, theirs = tensors(model), tensors(twin)
    if mine.keys() != theirs.keys():
        odd = min(mine.keys() ^ theirs.keys())
        raise ValueError(f"{odd} is not in both {type(model).__name__} and {name}: use layout='ragged'")
    for path, module in twin.named_modules():
        original = model.get_submodule(path)
        for key, value in vars(original).items():
            if type(value) is int and key in vars(module):
                setattr(module, key, value)
        module._parameters.update(original._parameters)
        module._buffers.update(original._buffers)
        module.training = original.training
    choose_layout(twin, "stock", inputs=inputs)
    gap = difference(outputs(model, inputs), outputs(twin, inputs))
    if gap != 0.0:
        raise ValueError(f"{name} gives outputs that differ from {type(model).__name__} by {gap:.3g}: use 'ragged'")
    return twin
