import copy

import pytest
import torch
import transformers as tf
from hand_pruned import FAMILIES, TOKENS, outputs
from same import assert_same_weights

from hf_subprune.coverage import tiny_model
from hf_subprune.discovery.discover import discover
from hf_subprune.discovery.probe_inputs import probe_inputs
from hf_subprune.storage.layout import adopt, choose_layout
from hf_subprune.storage.skeleton import describe, nested_configs, sizes
from hf_subprune.storage.stock import find_stock_config
from hf_subprune.surgery.edits import shrink


def config_state(model):
    return [copy.deepcopy(vars(config)) for _, config in nested_configs(model.config)]


def test_describe_lists_what_is_smaller_than_the_config_says():
    spec = describe(FAMILIES["gpt2"].pruned(mlp=[40, 44], heads=[4, 2]))
    assert spec.shapes == {
        "transformer.h.0.mlp.c_fc.weight": (32, 40),
        "transformer.h.0.mlp.c_fc.bias": (40,),
        "transformer.h.0.mlp.c_proj.weight": (40, 32),
        "transformer.h.1.attn.c_attn.weight": (32, 48),
        "transformer.h.1.attn.c_attn.bias": (48,),
        "transformer.h.1.attn.c_proj.weight": (16, 32),
    }
    assert spec.attributes == {
        "transformer.h.0.mlp.c_fc": {"nf": 40},
        "transformer.h.0.mlp.c_proj": {"nx": 40},
        "transformer.h.1.attn": {"num_heads": 2, "split_size": 16},
        "transformer.h.1.attn.c_attn": {"nf": 48},
        "transformer.h.1.attn.c_proj": {"nx": 16},
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_describe_finds_nothing_in_a_whole_model(family):
    assert not describe(FAMILIES[family].pruned())


def test_describe_sees_a_layer_that_reads_its_own_config():
    spec = describe(FAMILIES["phi3"].pruned(heads=[4, 3]))
    attention = spec.attributes["model.layers.1.self_attn"]
    heads = {"num_key_value_heads": 3, "config.num_attention_heads": 3, "config.num_key_value_heads": 3}
    assert attention == heads
    assert "model.layers.0.self_attn" not in spec.attributes


STOCK = [
    ("bert", {"mlp": [40, 40]}, {"intermediate_size": 40}),
    ("distilbert", {"mlp": [40, 40]}, {"hidden_dim": 40}),
    ("gpt2", {"mlp": [40, 40]}, {"n_inner": 40}),
    ("llama", {"mlp": [40, 40]}, {"intermediate_size": 40}),
    ("llama", {"heads": [2, 2]}, {"num_attention_heads": 2, "num_key_value_heads": 2}),
    ("qwen2", {"heads": [3, 3]}, {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 8}),
    ("qwen2", {"heads": [2, 2]}, {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}),
    ("phi3", {"heads": [2, 2]}, {"num_attention_heads": 2, "num_key_value_heads": 2}),
    ("vit", {"mlp": [40, 40], "heads": [3, 3]}, {"intermediate_size": 40, "num_attention_heads": 3, "head_dim": 8}),
    ("vit", {"heads": [1, 1]}, {"num_attention_heads": 1, "head_dim": 8}),
    ("bart", {"mlp": [40, 40]}, {"encoder_ffn_dim": 40, "decoder_ffn_dim": 44}),
]


@pytest.mark.parametrize(("family", "kept", "values"), STOCK)
def test_stock_where_the_config_can_say_it(family, kept, values, tmp_path):
    model = FAMILIES[family].pruned(**kept)
    before = config_state(model)
    layout = choose_layout(model, "stock", inputs=FAMILIES[family].inputs)
    assert layout.kind == "stock"
    assert {name: getattr(model.config, name) for name in values} == values
    assert not hasattr(model.config, "subprune")
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert_same_weights(again, model)
    torch.testing.assert_close(outputs(again, FAMILIES[family].inputs), outputs(model, FAMILIES[family].inputs))
    layout.undo()
    assert config_state(model) == before


def test_stock_reaches_the_config_of_a_part():
    model = FAMILIES["clip"].pruned(mlp=[40, 40])
    layout = choose_layout(model, "auto", inputs=FAMILIES["clip"].inputs)
    assert (layout.kind, layout.reason) == ("stock", "text_config.intermediate_size=40")
    assert model.config.text_config.intermediate_size == model.text_model.config.intermediate_size == 40
    assert model.config.vision_config.intermediate_size == 44


def test_stock_reaches_the_copies_of_the_config_that_modules_hold():
    family = FAMILIES["t5"]
    model = family.pruned(mlp=[40, 40])
    for block in model.decoder.block:
        mlp = block.layer[2].DenseReluDense
        mlp.wi.weight, mlp.wo.weight = (
            torch.nn.Parameter(weight.detach()) for weight in (mlp.wi.weight[:40], mlp.wo.weight[:, :40])
        )
        mlp.wi.out_features = mlp.wo.in_features = 40
    assert model.encoder.config is not model.config
    layout = choose_layout(model, "auto", inputs=family.inputs)
    assert layout.kind == "stock"
    assert (model.config.d_ff, model.encoder.config.d_ff, model.decoder.config.d_ff) == (40, 40, 40)
    layout.undo()
    assert (model.config.d_ff, model.encoder.config.d_ff, model.decoder.config.d_ff) == (44, 44, 44)


RAGGED = [
    ("bert", {"heads": [3, 3]}, "no value of BertConfig builds bert.encoder.layer.0.attention"),
    ("bert", {"heads": [2, 2]}, "no value of BertConfig builds bert.encoder.layer.0.attention"),
    ("gpt2", {"heads": [2, 2]}, "no value of GPT2Config builds transformer.h.0.attn"),
    ("llama", {"heads": [3, 3]}, "LlamaConfig refuses num_attention_heads=3: The hidden size"),
    ("t5", {"mlp": [40, 40]}, "no value of T5Config builds"),
    ("clip", {"heads": [2, 2]}, "no value of CLIPConfig builds vision_model.encoder.layers.0.self_attn"),
    ("llama", {"mlp": [40, 36]}, "one width for all layers, but .*0.mlp.* is .40, 32. and .*1.mlp.* is .36, 32."),
]


@pytest.mark.parametrize(("family", "kept", "reason"), RAGGED)
def test_ragged_where_it_cannot(family, kept, reason):
    model = FAMILIES[family].pruned(**kept)
    before = config_state(model)
    with pytest.raises(ValueError, match=rf"layout='stock' is not possible for .*{reason}.*layout='ragged'"):
        choose_layout(model, "stock", inputs=FAMILIES[family].inputs)
    assert config_state(model) == before
    layout = choose_layout(model, "auto", inputs=FAMILIES[family].inputs)
    assert layout.kind == "ragged"
    entry = model.config.subprune
    assert entry["library"] == "hf_subprune" and "pip install hf_subprune" in entry["notice"]
    layout.undo()
    assert config_state(model) == before


def test_ragged_on_demand():
    model = FAMILIES["bert"].pruned(mlp=[40, 40])
    layout = choose_layout(model, "ragged", inputs=TOKENS)
    assert (layout.kind, layout.reason) == ("ragged", "asked for")
    assert model.config.intermediate_size == 44


def test_a_whole_model_needs_nothing():
    model = FAMILIES["bert"].pruned()
    assert choose_layout(model, "ragged", inputs=TOKENS).kind == "stock"
    assert not hasattr(model.config, "subprune")


def test_parts_with_their_own_config_carry_their_own_widths():
    model = FAMILIES["clip"].pruned(mlp=[40, 36], heads=[3, 2])
    choose_layout(model, "auto", inputs=FAMILIES["clip"].inputs)
    assert all(name.startswith("vision_model.") for name in model.config.vision_config.subprune["shapes"])
    assert all(name.startswith("text_model.") for name in model.config.text_config.subprune["shapes"])


def test_pruning_again_describes_the_new_widths():
    family = FAMILIES["bert"]
    model = family.pruned(mlp=[40, 36])
    choose_layout(model, "auto", inputs=TOKENS)
    layer = model.bert.encoder.layer[0]
    for linear in (layer.intermediate.dense, layer.output.dense):
        linear.weight = torch.nn.Parameter(linear.weight.detach()[:36, :36].clone())
    layer.intermediate.dense.weight = torch.nn.Parameter(torch.randn(36, 32))
    layer.intermediate.dense.bias = torch.nn.Parameter(torch.randn(36))
    layer.output.dense.weight = torch.nn.Parameter(torch.randn(32, 36))
    layer.intermediate.dense.out_features = layer.output.dense.in_features = 36
    layout = choose_layout(model, "auto", inputs=TOKENS)
    assert (layout.kind, layout.reason) == ("stock", "intermediate_size=36")
    assert not hasattr(model.config, "subprune")
    layout.undo()
    assert model.config.subprune["shapes"]["bert.encoder.layer.0.intermediate.dense.bias"] == [40]


def test_what_widths_cannot_say_is_refused_and_nothing_changes():
    model = FAMILIES["bert"].pruned(mlp=[40, 36])
    model.bert.encoder.layer[0].intermediate.register_forward_hook(lambda module, args, output: output * 2)
    before = config_state(model)
    with pytest.raises(ValueError, match=r"gives outputs that differ by .*forward hook"):
        choose_layout(model, "auto", inputs=TOKENS)
    assert config_state(model) == before


def test_a_stock_config_that_gives_other_outputs_is_not_used(monkeypatch):
    """Half as many heads of twice the size have the same shapes in ViT, and other outputs."""
    family = FAMILIES["vit"]
    model = family.pruned(mlp=[40, 40])
    spec = describe(model)
    found = find_stock_config(type(model), model.config, spec, sizes(model, spec))
    found.config.num_attention_heads = 2
    monkeypatch.setattr("hf_subprune.storage.layout.find_stock_config", lambda *_: found)
    layout = choose_layout(model, "auto", inputs=family.inputs)
    assert layout.kind == "ragged" and "differ by" in layout.reason
    assert (model.config.intermediate_size, model.config.num_attention_heads) == (44, 4)


def test_mode_of_training_and_random_state_are_left_alone():
    model = FAMILIES["bert"].pruned(mlp=[40, 36]).train()
    model.classifier.eval()
    state = torch.random.get_rng_state()
    choose_layout(model, "auto", inputs=TOKENS)
    assert model.training and not model.classifier.training
    assert torch.equal(torch.random.get_rng_state(), state)


def test_parameters_are_the_same_objects_afterwards():
    model = FAMILIES["gpt2"].pruned(mlp=[40, 36])
    before = list(model.parameters())
    choose_layout(model, "auto", inputs=TOKENS)
    assert all(mine is theirs for mine, theirs in zip(model.parameters(), before, strict=True))
    assert model.lm_head.weight is model.transformer.wte.weight


def test_a_quantized_model_is_refused():
    model = FAMILIES["bert"].pruned(mlp=[40, 36])
    model.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(ValueError, match="is quantized with 'gptq': prune the model before it is quantized"):
        choose_layout(model, "auto", inputs=TOKENS)
    assert model.config.quantization_config == {"quant_method": "gptq", "bits": 4}


def test_unknown_layout_is_refused():
    with pytest.raises(ValueError, match=r"layout must be 'auto', 'stock' or 'ragged', got 'dense'"):
        choose_layout(FAMILIES["bert"].pruned(), "dense", inputs=TOKENS)


def test_a_model_without_its_optional_parts_is_proved_without_them():
    model = tf.BertModel(FAMILIES["bert"].build().config, add_pooling_layer=False)
    pruned = FAMILIES["bert"].pruned(mlp=[40, 36]).bert.encoder
    model.encoder = pruned
    assert choose_layout(model, "auto", inputs=TOKENS).kind == "ragged"


def test_adopt_sets_numbers_only_where_they_differ():
    model = FAMILIES["bert"].pruned()
    config = copy.deepcopy(model.config)
    config.intermediate_size = 40
    adopt(model, config)
    assert model.config.intermediate_size == 40
    assert model.config is model.bert.config


def test_a_variant_that_the_model_switched_to_is_stored():
    model = tiny_model("big_bird")
    inputs = probe_inputs(model)
    heads = next(block for block in discover(model, inputs).blocks if block.kind == "attention")
    shrink(model, heads, [1])
    assert model.config.attention_type == "block_sparse"
    layout = choose_layout(model, "ragged", inputs=inputs)
    assert model.config.attention_type == "original_full" and "attention_type is 'original_full'" in layout.reason
    layout.undo()
    assert model.config.attention_type == "block_sparse"
