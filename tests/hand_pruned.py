"""Tiny models of each family and pruning by hand, for tests of what happens after pruning."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import transformers as tf
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

HIDDEN, HEADS, HEAD, MLP, LAYERS = 32, 4, 8, 44, 2
TOKENS = {"input_ids": torch.arange(1, 13).view(2, 6)}
IMAGES = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)}
TEXT = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
IMAGE = {"image_size": 16, "patch_size": 8}
SIZES = {"hidden_size": HIDDEN, "num_attention_heads": HEADS, "num_hidden_layers": LAYERS, "intermediate_size": MLP}


@dataclass(frozen=True)
class Blocks:
    """Where one kind of block is in each layer `{}`: producers, consumer, attributes of the module that holds them."""

    producers: tuple[str, ...]
    consumer: str
    attributes: dict[str, int] = field(default_factory=dict)
    """Dotted path of an integer attribute -> its value per head."""


@dataclass(frozen=True)
class Family:
    build: Callable[[], PreTrainedModel]
    inputs: dict[str, torch.Tensor]
    mlp: Blocks
    attention: Blocks

    def pruned(self, mlp: Sequence[int] = (), heads: Sequence[int] = (), seed: int = 0) -> PreTrainedModel:
        """A random model whose layers keep `mlp` neurons and `heads` heads (all where empty), the last ones."""
        torch.manual_seed(seed)
        model = self.build().eval()
        for layer, kept in enumerate(mlp):
            _prune(model, self.mlp, layer, kept, kept)
        for layer, kept in enumerate(heads):
            _prune(model, self.attention, layer, kept, kept * HEAD)
        return model


def _prune(model: PreTrainedModel, blocks: Blocks, layer: int, kept: int, width: int) -> None:
    for path in blocks.producers:
        _keep(model.get_submodule(path.format(layer)), outputs=width)
    _keep(model.get_submodule(blocks.consumer.format(layer)), inputs=width)
    for attribute, per_head in blocks.attributes.items():
        path, _, name = attribute.format(layer).rpartition(".")
        if path.endswith(".config"):  # a forward that reads the config: this layer gets its own
            module = model.get_submodule(path.removesuffix(".config"))
            module.config = copy.deepcopy(module.config)
            setattr(module.config, name, kept * per_head)
        else:
            setattr(model.get_submodule(path), name, kept * per_head)


def _keep(linear: nn.Module, outputs: int | None = None, inputs: int | None = None) -> None:
    """Keep the last `outputs` rows or `inputs` columns of a linear map; fused maps keep those of each part."""
    conv = isinstance(linear, Conv1D)
    names = ("nx", "nf") if conv else ("in_features", "out_features")
    weight = linear.weight.data if conv else linear.weight.data.T
    if outputs is not None:
        parts = {3 * HIDDEN: 3, 2 * MLP: 2}.get(weight.shape[1], 1)
        weight, bias = _last(weight, outputs, parts), linear.bias
        if bias is not None:
            linear.bias = nn.Parameter(_last(bias.data, outputs, parts), requires_grad=bias.requires_grad)
    if inputs is not None:
        weight = weight[-inputs:]
    setattr(linear, names[0], weight.shape[0])
    setattr(linear, names[1], weight.shape[1])
    linear.weight = nn.Parameter((weight if conv else weight.T).clone().contiguous())


def _last(tensor: torch.Tensor, size: int, parts: int) -> torch.Tensor:
    return torch.cat([part[..., -size:] for part in tensor.chunk(parts, dim=-1)], dim=-1)


def outputs(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """All float outputs of a forward, in one vector."""
    with torch.no_grad():
        values = model(**inputs, return_dict=False)
    return torch.cat([value.flatten().float() for value in values if isinstance(value, torch.Tensor)])


def _layers(base: str, producers: Sequence[str], consumer: str, **attributes: int) -> Blocks:
    """Blocks whose paths all start with `base`; `a__b` in a keyword is the attribute `a.b`."""
    named = {base + name.replace("__", "."): value for name, value in attributes.items()}
    return Blocks(tuple(base + name for name in producers), base + consumer, named)


FAMILIES = {
    "bert": Family(
        lambda: tf.BertForSequenceClassification(tf.BertConfig(**SIZES, **TEXT, max_position_embeddings=16)),
        TOKENS,
        _layers("bert.encoder.layer.{}.", ["intermediate.dense"], "output.dense"),
        _layers(
            "bert.encoder.layer.{}.attention.",
            ["self.query", "self.key", "self.value"],
            "output.dense",
            self__num_attention_heads=1,
            self__all_head_size=HEAD,
        ),
    ),
    "distilbert": Family(
        lambda: tf.DistilBertModel(
            tf.DistilBertConfig(dim=HIDDEN, n_heads=HEADS, n_layers=LAYERS, hidden_dim=MLP, vocab_size=64)
        ),
        TOKENS,
        _layers("transformer.layer.{}.ffn.", ["lin1"], "lin2"),
        _layers("transformer.layer.{}.attention.", ["q_lin", "k_lin", "v_lin"], "out_lin", n_heads=1),
    ),
    "gpt2": Family(
        lambda: tf.GPT2LMHeadModel(
            tf.GPT2Config(n_embd=HIDDEN, n_head=HEADS, n_layer=LAYERS, n_inner=MLP, n_positions=32, **TEXT)
        ),
        TOKENS,
        _layers("transformer.h.{}.mlp.", ["c_fc"], "c_proj"),
        _layers("transformer.h.{}.attn.", ["c_attn"], "c_proj", num_heads=1, split_size=HEAD),
    ),
    "llama": Family(
        lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES, **TEXT)),
        TOKENS,
        _layers("model.layers.{}.mlp.", ["gate_proj", "up_proj"], "down_proj"),
        _layers("model.layers.{}.self_attn.", ["q_proj", "k_proj", "v_proj"], "o_proj"),
    ),
    "qwen2": Family(
        lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**SIZES, num_key_value_heads=HEADS, **TEXT)),
        TOKENS,
        _layers("model.layers.{}.mlp.", ["gate_proj", "up_proj"], "down_proj"),
        _layers("model.layers.{}.self_attn.", ["q_proj", "k_proj", "v_proj"], "o_proj"),
    ),
    "phi3": Family(
        lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**SIZES, **TEXT)),
        TOKENS,
        _layers("model.layers.{}.mlp.", ["gate_up_proj"], "down_proj"),
        _layers(
            "model.layers.{}.self_attn.",
            ["qkv_proj"],
            "o_proj",
            num_key_value_heads=1,
            config__num_attention_heads=1,
            config__num_key_value_heads=1,
        ),
    ),
    "vit": Family(
        lambda: tf.ViTForImageClassification(tf.ViTConfig(**SIZES, **IMAGE)),
        IMAGES,
        _layers("vit.layers.{}.mlp.", ["fc1"], "fc2"),
        _layers("vit.layers.{}.attention.", ["q_proj", "k_proj", "v_proj"], "o_proj"),
    ),
    "t5": Family(
        lambda: tf.T5ForConditionalGeneration(
            tf.T5Config(d_model=HIDDEN, d_kv=HEAD, num_heads=HEADS, num_layers=LAYERS, d_ff=MLP, **TEXT)
        ),
        {**TOKENS, "decoder_input_ids": TOKENS["input_ids"].flip(1)},
        _layers("encoder.block.{}.layer.1.DenseReluDense.", ["wi"], "wo"),
        _layers("decoder.block.{}.layer.1.EncDecAttention.", ["q", "k", "v"], "o", n_heads=1, inner_dim=HEAD),
    ),
    "bart": Family(
        lambda: tf.BartForConditionalGeneration(
            tf.BartConfig(
                d_model=HIDDEN,
                encoder_attention_heads=HEADS,
                decoder_attention_heads=HEADS,
                encoder_layers=LAYERS,
                decoder_layers=LAYERS,
                encoder_ffn_dim=MLP,
                decoder_ffn_dim=MLP,
                max_position_embeddings=32,
                decoder_start_token_id=2,
                forced_eos_token_id=None,
                **TEXT,
            )
        ),
        TOKENS,
        _layers("model.encoder.layers.{}.", ["fc1"], "fc2"),
        _layers("model.decoder.layers.{}.encoder_attn.", ["q_proj", "k_proj", "v_proj"], "out_proj", num_heads=1),
    ),
    "clip": Family(
        lambda: tf.CLIPModel(
            tf.CLIPConfig(text_config={**SIZES, **TEXT}, vision_config={**SIZES, **IMAGE}, projection_dim=16)
        ),
        {**TOKENS, **IMAGES},
        _layers("text_model.encoder.layers.{}.mlp.", ["fc1"], "fc2"),
        _layers("vision_model.encoder.layers.{}.self_attn.", ["q_proj", "k_proj", "v_proj"], "out_proj", num_heads=1),
    ),
}
