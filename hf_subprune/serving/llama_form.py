"""Whether a model computes what Llama computes, found by trial, and the widths of its layers.

Other runtimes have a form with widths by layer for the network of Llama and for no other. Which models are that
network is no matter of their names: a `LlamaForCausalLM` takes the tensors and must give the same logits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedConfig, PreTrainedModel

from ..models.forwards import adapted
from ..storage.layout import difference, outputs
from ..storage.skeleton import build_skeleton, tensors
from ..storage.spec import adaptations

LAYERS = "model.layers"
"""Path of the layers in `LlamaForCausalLM`, and in all that are its network."""

_PROBE_TOKENS = 24
# Same operations on the same tensors; only their order may differ between two implementations.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_FREQUENCIES = ("default", "linear", "llama3")
"""Rotary embeddings whose frequencies do not change with the length of the text, and that scale nothing else."""


@dataclass(frozen=True)
class LayerWidths:
    """Widths of one layer; what is gone has none.

    Args:
        heads: Query heads.
        groups: Key/value heads.
        neurons: Of the MLP.
    """

    heads: int
    groups: int
    neurons: int


def check_llama(model: PreTrainedModel) -> None:
    """Refuse a model that does not compute what Llama computes.

    Raises:
        ValueError: it has other tensors, or gives other logits; the message says which, or how far they are apart.
    """
    name = type(model).__name__
    check_positions(model.config)
    twin = _twin(model)
    mine, theirs = tensors(model), tensors(twin)
    if odd := sorted(theirs.keys() ^ mine.keys()):
        raise ValueError(f"{odd[0]} is not in both {name} and Llama")
    tokens = torch.arange(_PROBE_TOKENS, device=model.device) * 7 % model.config.vocab_size
    expected, found = (outputs(one, {"input_ids": tokens[None], "use_cache": False}) for one in (model, twin))
    gap = difference(expected, found)
    limit = _TOLERANCE.get(model.dtype, 0.0) * max(value.abs().max().item() for value in expected.values())
    if not gap <= limit:
        raise ValueError(f"{name} gives other logits than Llama with the same weights, by {gap:.3g}")


def check_positions(config: PreTrainedConfig) -> None:
    """Refuse what a short text does not show: windows of attention, and rotations that change with the length.

    Raises:
        ValueError: the config says that there are some.
    """
    window = getattr(config, "sliding_window", None)
    if window is not None and window < config.max_position_embeddings:
        raise ValueError(
            f"{type(config).__name__} looks back on {window} tokens only (sliding_window): set it to None and save "
            "the model again, if texts are to be shorter than that"
        )
    kind = rope_parameters(config).get("rope_type", "default")
    if kind not in _FREQUENCIES:
        raise ValueError(f"rope_type is {kind!r}, and none of {', '.join(map(repr, _FREQUENCIES))}")


def rope_parameters(config: PreTrainedConfig) -> Mapping[str, Any]:
    """How positions are rotated: `rope_type`, `rope_theta` and what else the type has."""
    return getattr(config, "rope_parameters", None) or {}


def head_size(model: PreTrainedModel) -> int:
    """Entries of one head."""
    return int(vars(model.get_submodule(f"{LAYERS}.0.self_attn"))["head_dim"])


def layer_widths(model: PreTrainedModel) -> list[LayerWidths]:
    """Widths of each layer, by the shapes of its linears."""
    size = head_size(model)
    layers = model.get_submodule(LAYERS)
    return [
        LayerWidths(
            heads=_rows(layer, "self_attn.q_proj") // size,
            groups=_rows(layer, "self_attn.k_proj") // size,
            neurons=_rows(layer, "mlp.up_proj"),
        )
        for layer in layers.children()
    ]


def bias_left(model: PreTrainedModel, number: int, path: str) -> bool:
    """Whether a linear of a layer still adds something where nothing reaches it."""
    bias = model.get_submodule(f"{LAYERS}.{number}.{path}")._parameters.get("bias")
    return bias is not None and bool(bias.any())


def frequency_factors(model: PreTrainedModel) -> torch.Tensor | None:
    """By what the rotary frequencies are divided: `(head_dim / 2,)` float32; `None` if by nothing."""
    theta = rope_parameters(model.config).get("rope_theta", 10000.0)
    held = model.get_submodule("model.rotary_emb").get_buffer("inv_freq").float().cpu()
    plain = 1.0 / theta ** (torch.arange(len(held), dtype=torch.float32) / len(held))
    factors = plain / held
    return None if torch.allclose(factors, torch.ones_like(factors), rtol=1e-4) else factors


def _rows(layer: nn.Module, path: str) -> int:
    weight = layer.get_submodule(path)._parameters["weight"]
    assert weight is not None
    return weight.shape[0]


def _twin(model: PreTrainedModel) -> PreTrainedModel:
    """Llama over the tensors of `model`, which are shared; with those of a layer only where `model` has them."""
    config = model.config
    try:
        values = {name: getattr(config, name) for name in ("vocab_size", "hidden_size", "num_hidden_layers")}
        values["rms_norm_eps"], size = config.rms_norm_eps, head_size(model)
    except (AttributeError, KeyError) as error:
        raise ValueError(f"{type(model).__name__} is built otherwise than Llama ({error})") from error
    built = LlamaConfig(
        **values,
        head_dim=size,
        num_attention_heads=1,  # heads, groups and neurons are those of the tensors
        num_key_value_heads=1,
        intermediate_size=1,
        max_position_embeddings=config.max_position_embeddings,
        rope_parameters=dict(rope_parameters(config)),
    )
    built._attn_implementation = config._attn_implementation
    twin = build_skeleton(LlamaForCausalLM, built)
    originals = dict(model.named_modules())
    for path, module in twin.named_modules():
        original = originals.get(path)
        if original is None:
            raise ValueError(f"{type(model).__name__} has no module {path!r}, which Llama has")
        for key, value in vars(original).items():
            if type(value) is int and key in vars(module):
                setattr(module, key, value)
        module._parameters.update({key: original._parameters.get(key) for key in module._parameters})
        module._buffers.update({key: original._buffers[key] for key in module._buffers if key in original._buffers})
        if (bypass := adaptations(original)[2]) is not None:
            vars(module).update(adapted(module, None, {}, bypass))
    return twin
