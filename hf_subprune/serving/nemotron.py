"""A ragged model as a folder for vLLM, whose `DeciLMForCausalLM` reads widths by layer from block configs.

It takes MLPs of any width, key/value heads by layer, and layers without attention or without an MLP; query heads are
as many in every layer. Its config is no part of vLLM: a file of code beside the weights holds it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from transformers import AutoTokenizer, PreTrainedModel
from transformers.utils import CONFIG_NAME

from ..storage.entry import listed
from .llama_form import LAYERS, LayerWidths, bias_left, check_llama, head_size, layer_widths, rope_parameters

CONFIG_MODULE = "configuration_decilm"

_CONFIG_CODE = '''"""The config of a Llama with widths by layer, as vLLM reads it for DeciLMForCausalLM."""

from types import SimpleNamespace

from transformers import LlamaConfig


class DeciLMConfig(LlamaConfig):
    """Llama with one entry of `block_configs` for each layer.

    An entry has `attention`, with `no_op` and `n_heads_in_group` (query heads for each key/value head), and `ffn`,
    with `no_op` and `intermediate_size`.
    """

    model_type = "nemotron-nas"

    def __init__(self, block_configs=(), **values):
        super().__init__(**values)
        self.block_configs = [
            SimpleNamespace(**{part: SimpleNamespace(**sizes) for part, sizes in block.items()})
            for block in block_configs
        ]

    def to_dict(self):
        blocks = [{part: vars(sizes) for part, sizes in vars(block).items()} for block in self.block_configs]
        return {**super().to_dict(), "block_configs": blocks}
'''


def write_nemotron(model: PreTrainedModel, source: str | Path, out: Path) -> None:
    """Write a causal language model into a new folder, with its tokenizer if it has one.

    Args:
        model: On any device.
        source: Where it was loaded from.
        out: The folder, which is made.

    Raises:
        ValueError: vLLM has no form for its widths; the message says why. Nothing is written.
    """
    config = _config(model)
    out.mkdir(parents=True)
    save_torch_state_dict(dict(_tensors(model)), out, max_shard_size="5GB")
    (out / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (out / f"{CONFIG_MODULE}.py").write_text(_CONFIG_CODE, encoding="utf-8")
    if model.generation_config is not None:
        model.generation_config.save_pretrained(out)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError):
        return
    tokenizer.save_pretrained(out)


def _config(model: PreTrainedModel) -> dict[str, Any]:
    """What config.json says."""
    name, config = type(model).__name__, model.config
    if listed(config) is None:
        raise ValueError(
            f"{name} has the stock layout: vLLM takes its folder as it is, if it takes the architecture. Give that "
            "folder to `vllm serve`"
        )
    try:
        check_llama(model)
        widths = layer_widths(model)
        heads = _query_heads(widths)
        for number, one in enumerate(widths):
            if not one.heads and bias_left(model, number, "self_attn.o_proj"):
                raise ValueError(f"the attention of layer {number} is gone but for a bias")
            if not one.neurons and bias_left(model, number, "mlp.down_proj"):
                raise ValueError(f"the MLP of layer {number} is gone but for a bias")
    except ValueError as error:
        raise ValueError(
            f"{name} cannot be exported to vLLM: {error}. Prune with layout='stock' instead, or with units=('mlp',)."
        ) from error
    kept = ("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings", "rms_norm_eps", "hidden_size")
    layer = model.get_submodule(f"{LAYERS}.0")
    return {
        **{key: getattr(config, key) for key in kept},
        "architectures": ["DeciLMForCausalLM"],
        "auto_map": {"AutoConfig": f"{CONFIG_MODULE}.DeciLMConfig"},
        "model_type": "nemotron-nas",
        "block_configs": [_block(heads, one) for one in widths],
        "num_hidden_layers": len(widths),
        "num_attention_heads": heads,
        "head_dim": head_size(model),
        "hidden_act": config.hidden_act,
        "rope_parameters": dict(rope_parameters(config)),
        "tie_word_embeddings": config.tie_word_embeddings,
        "vocab_size": model.get_input_embeddings().get_parameter("weight").shape[0],
        "attention_bias": layer.get_submodule("self_attn.o_proj")._parameters["bias"] is not None,
        "qkv_bias": layer.get_submodule("self_attn.q_proj")._parameters["bias"] is not None,
        "mlp_bias": layer.get_submodule("mlp.down_proj")._parameters["bias"] is not None,
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def _query_heads(widths: list[LayerWidths]) -> int:
    """Query heads of every layer.

    Raises:
        ValueError: layers have different numbers, or vLLM's layers do not add up without the first attention.
    """
    numbers = {one.heads for one in widths if one.heads}
    if len(numbers) != 1:
        found = ", ".join(str(one.heads) for one in widths)
        raise ValueError(f"its layers have {found} query heads, and vLLM takes as many in each")
    if not widths[0].heads:
        raise ValueError("its first layer has no attention, which vLLM cannot do without there")
    return numbers.pop()


def _block(heads: int, widths: LayerWidths) -> dict[str, dict[str, Any]]:
    groups = heads // widths.groups if widths.groups else None
    return {
        "attention": {"no_op": not widths.heads, "n_heads_in_group": groups, "replace_with_linear": False},
        "ffn": {"no_op": not widths.neurons, "intermediate_size": widths.neurons or None},
    }


def _tensors(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Those of the sublayers that are there."""
    widths = layer_widths(model)
    for name, tensor in model.state_dict().items():
        if name.startswith(f"{LAYERS}."):
            number, _, rest = name.removeprefix(f"{LAYERS}.").partition(".")
            attention = rest.startswith(("self_attn.", "input_layernorm."))
            if not (widths[int(number)].heads if attention else widths[int(number)].neurons):
                continue
        elif name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        yield name, tensor.contiguous()
