import json

import pytest
import torch
import transformers as tf
from huggingface_hub import load_torch_model
from served import PROMPT, TEXT, byte_level, causal_lm
from torch import nn

from hf_subprune import PruneConfig, prune
from hf_subprune.serving.export import export

PIECES = [TEXT[start : start + 120] for start in range(0, len(TEXT) - 120, 30)]
SMALL = {"samples": 16, "held_out": 4, "batch_size": 4, "max_length": 32, "loss_aware": False, "layout": "ragged"}


def saved(model, folder, **config):
    prune(model, PIECES, PruneConfig(**SMALL, **config), byte_level())
    model.save_pretrained(folder)
    byte_level().save_pretrained(folder)
    return folder


class Nothing(nn.Module):
    """In place of a sublayer that block configs leave out."""

    def forward(self, hidden_states, **_):
        return torch.zeros_like(hidden_states), None


def rebuilt(folder):
    """The model that the block configs of a folder describe, as vLLM builds it: layer by layer, all weights taken."""
    config = tf.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    values = {**config.to_dict(), "attention_bias": config.qkv_bias}
    blocks = values.pop("block_configs")
    values = {name: value for name, value in values.items() if name not in ("architectures", "model_type", "auto_map")}
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**values))
    for number, block in enumerate(config.block_configs):
        sizes = {"num_hidden_layers": number + 1}
        if not block.attention.no_op:
            sizes["num_key_value_heads"] = config.num_attention_heads // block.attention.n_heads_in_group
        if not block.ffn.no_op:
            sizes["intermediate_size"] = block.ffn.intermediate_size
        layer = tf.LlamaForCausalLM(tf.LlamaConfig(**{**values, **sizes})).model.layers[number]
        if block.attention.no_op:
            layer.self_attn, layer.input_layernorm = Nothing(), nn.Identity()
        if block.ffn.no_op:
            layer.mlp = type("Zero", (nn.Module,), {"forward": lambda self, x: torch.zeros_like(x)})()
            layer.post_attention_layernorm = nn.Identity()
        if not config.attention_bias and not block.attention.no_op:
            layer.self_attn.o_proj.bias = None
        model.model.layers[number] = layer
    assert len(blocks) == config.num_hidden_layers
    load_torch_model(model, folder, strict=not config.tie_word_embeddings)
    return model.eval()


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (lambda: causal_lm(), {"keep": 0.7, "units": ("mlp",), "budget": "global"}),
        (lambda: causal_lm(), {"keep": 1.0, "remove": ("*.0.mlp", "*.1.self_attn", "*.layers.2.*")}),
        (
            lambda: causal_lm(tf.Qwen2ForCausalLM, tf.Qwen2Config),
            {"keep": 0.7, "units": ("mlp",), "budget": "global"},
        ),
    ],
    ids=["widths", "lost-sublayers", "qwen2"],
)
def test_the_model_that_the_folder_describes_gives_the_same_logits(model, options, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = saved(model(), tmp_path / "model", **options)
    out = export(folder, "vllm", tmp_path / "out")
    tokens = tf.AutoTokenizer.from_pretrained(out)(PROMPT, return_tensors="pt")["input_ids"]
    pruned = tf.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        torch.testing.assert_close(rebuilt(out)(tokens).logits, pruned(tokens).logits, atol=1e-5, rtol=1e-5)


def test_the_config_has_what_vllm_reads(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = saved(causal_lm(), tmp_path / "model", keep=1.0, remove=("*.0.mlp", "*.1.self_attn"))
    out = export(folder, "vllm", tmp_path / "out")
    said = json.loads((out / "config.json").read_text())
    assert said["architectures"] == ["DeciLMForCausalLM"] and said["model_type"] == "nemotron-nas"
    assert said["block_configs"][0]["ffn"] == {"no_op": True, "intermediate_size": None}
    assert said["block_configs"][1]["attention"]["no_op"] is True
    config = tf.AutoConfig.from_pretrained(out, trust_remote_code=True)
    assert [block.attention.n_heads_in_group for block in config.block_configs] == [2, None, 2, 2]
    assert [block.ffn.intermediate_size for block in config.block_configs] == [None, 96, 96, 96]
    assert not any(hasattr(block.ffn, "ffn_mult") for block in config.block_configs)  # vLLM would go by that
    config.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert again["block_configs"] == said["block_configs"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0.7, "budget": "global", "units": ("attention",)}, r"query heads, and vLLM takes as many in each"),
        ({"keep": 1.0, "remove": ("*.0.self_attn",)}, "its first layer has no attention"),
    ],
)
def test_what_vllm_has_no_form_for_is_refused_with_the_reason(options, message, tmp_path):
    folder = saved(causal_lm(), tmp_path / "model", **options)
    with pytest.raises(ValueError, match=f"cannot be exported to vLLM: .*{message}.*layout='stock'"):
        export(folder, "vllm", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_stock_model_is_told_to_be_ready(tmp_path):
    causal_lm().save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"has the stock layout.*Give that folder to `vllm serve`"):
        export(tmp_path / "model", "vllm", tmp_path / "out")
