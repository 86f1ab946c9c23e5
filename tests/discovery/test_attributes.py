import pytest

from hf_subprune.coverage import tiny_model
from hf_subprune.discovery.discover import discover


@pytest.mark.parametrize(
    ("model_type", "name", "kind", "attributes"),
    [
        # Another block of the same layer removes rows of the consumer.
        ("swinv2", "encoder.layers.0.blocks.0.attention.self.continuous_position_bias_mlp", "mlp", set()),
        # Its forward keeps what it computed from a parameter in a dictionary.
        ("levit", "encoder.stages.0.layers.0.attention", "attention", {"num_attention_heads", "out_dim_projection"}),
        # Widths say how a fused projection is split.
        ("qwen3_5_text", "layers.0.attention", "attention", {"num_v_heads", "num_k_heads", "key_dim", "value_dim"}),
    ],
)
def test_blocks_that_take_more_than_their_own_tensors(model_type, name, kind, attributes):
    blocks = {block.name: block for block in discover(tiny_model(model_type)).blocks}
    assert blocks[name].kind == kind
    assert {attribute.name for attribute in blocks[name].attributes} == attributes
