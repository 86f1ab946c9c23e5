import pytest
import torch
import transformers as tf
from hand_pruned import FAMILIES, TOKENS, outputs
from same import assert_same_weights

from hf_subprune.storage.layout import choose_layout
from hf_subprune.storage.recast import as_mistral


@pytest.mark.parametrize("inner", [False, True])
def test_three_heads_of_four_are_saved_as_mistral(inner, tmp_path):
    model = FAMILIES["llama"].pruned(heads=[3, 3], mlp=[40, 40])
    model = model.model if inner else model
    with pytest.raises(
        ValueError, match=r"refuses num_attention_heads=3.*hf_subprune\.storage\.recast\.as_mistral\(model, inputs"
    ):
        choose_layout(model, "stock", inputs=TOKENS)
    twin = as_mistral(model, TOKENS)
    assert type(twin) is (tf.MistralModel if inner else tf.MistralForCausalLM)
    assert (twin.config.num_attention_heads, twin.config.intermediate_size) == (3, 40)
    assert twin.config.sliding_window is None and not hasattr(twin.config, "subprune")
    assert all(mine is theirs for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True))
    twin.save_pretrained(tmp_path)
    again = (tf.AutoModel if inner else tf.AutoModelForCausalLM).from_pretrained(tmp_path)
    assert_same_weights(again, model)
    torch.testing.assert_close(outputs(again, TOKENS), outputs(model, TOKENS))
    assert model.config.num_attention_heads == 4


def test_widths_that_differ_between_layers_are_refused():
    with pytest.raises(ValueError, match="one width for all layers"):
        as_mistral(FAMILIES["llama"].pruned(heads=[3, 2]), TOKENS)


def test_biases_are_refused():
    model = FAMILIES["llama"].build()
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**model.config.to_dict() | {"attention_bias": True}))
    with pytest.raises(ValueError, match=r"bias is not in both LlamaForCausalLM and MistralForCausalLM"):
        as_mistral(model, TOKENS)


def test_other_architectures_are_refused():
    with pytest.raises(ValueError, match="BertForSequenceClassification has no counterpart in Mistral"):
        as_mistral(FAMILIES["bert"].build(), TOKENS)
