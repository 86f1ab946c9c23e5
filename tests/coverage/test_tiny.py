"""Tiny models of any architecture."""

import pytest
import torch

from hf_subprune.coverage import tiny
from hf_subprune.coverage.architectures import model_types
from hf_subprune.coverage.tiny import CannotBuildError, scatter_weights, tiny_config, tiny_model
from hf_subprune.discovery.probe_inputs import probe_inputs

SAMPLE = (
    "bert",
    "llama",
    "gpt2",
    "t5",
    "vit",
    "whisper",
    "mixtral",
    "llava",
    "qwen2_vl",
    "swin",
    "wav2vec2",
    "resnet",
)


@pytest.mark.parametrize("model_type", SAMPLE)
def test_builds_a_small_model_that_runs(model_type):
    model = tiny_model(model_type)

    assert not model.training
    assert model.config.model_type == model_type
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert sum(p.numel() for p in model.parameters()) < 1_000_000
    with torch.no_grad():
        output = model(**probe_inputs(model))[0]
    assert output.isfinite().all()
    assert output.std() > 0


def test_every_parameter_varies():
    constant = [name for name, p in tiny_model("beit").named_parameters() if p.numel() > 1 and p.std() == 0]
    assert not constant


def test_zero_initialised_layers_become_visible():
    layer = torch.nn.Linear(8, 8)
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    scatter_weights(layer)
    assert 0.5 < layer.weight.std() * 8**0.5 < 2
    assert layer.bias.std() > 0


def test_same_seed_gives_the_same_weights_and_leaves_the_global_state():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    first = tiny_model("bert", seed=1)
    assert torch.equal(torch.rand(2), expected)
    second, third = tiny_model("bert", seed=1), tiny_model("bert", seed=2)
    weights = [m.encoder.layer[0].output.dense.weight for m in (first, second, third)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text"])
def test_every_type_of_layer_is_shown(model_type):
    assert set(tiny_config(model_type).layer_types) == {"full_attention", "sliding_attention"}


def test_dense_and_sparse_layers_are_shown():
    layers = tiny_model("deepseek_v3").layers
    assert len({type(layer.mlp) for layer in layers}) == 2


def test_grouped_heads_stay_grouped_and_others_stay_ungrouped():
    mistral, llama = tiny_config("mistral"), tiny_config("llama")
    assert mistral.num_attention_heads == 2 * mistral.num_key_value_heads
    assert llama.num_attention_heads == llama.num_key_value_heads


def test_heads_that_follow_from_the_width_are_several():
    assert tiny_model("bridgetower_vision_model").visual.transformer.resblocks[0].attn.num_heads == 4


def test_sub_configurations_are_shrunk_and_their_tokens_agree():
    config = tiny_config("llava")
    assert config.text_config.num_hidden_layers == config.vision_config.num_hidden_layers == tiny.LAYERS
    assert config.image_token_id < config.text_config.vocab_size


def test_rotary_sections_fit_the_part_of_a_head_that_is_rotated():
    assert tiny.rotary_sections(16) == [4, 2, 2]
    if "hy_v4_vl_text" in model_types():
        config = tiny_config("hy_v4_vl_text")
        assert sum(config.rope_parameters["mrope_section"]) == config.qk_rope_head_dim // 2 == 8


def test_token_ids_stay_apart():
    images = [tiny.tiny_id(token) for token in (151652, 151653, 151655)]
    assert len(set(images)) == 3
    assert all(tiny.VOCABULARY // 2 <= image < tiny.VOCABULARY for image in images)
    assert tiny.tiny_id(1) == 1


def test_unknown_type_is_named():
    with pytest.raises(CannotBuildError, match="no_such_model"):
        tiny_model("no_such_model")


def test_too_large_a_model_is_refused_before_it_is_allocated():
    with pytest.raises(CannotBuildError, match="parameters"):
        tiny_model("bert", most_parameters=1000)


@pytest.mark.slow
def test_most_types_build():
    sample = model_types()[::25]
    built = 0
    for model_type in sample:
        try:
            built += tiny_model(model_type) is not None
        except CannotBuildError as error:
            assert model_type in str(error)
    assert built >= 0.7 * len(sample)
