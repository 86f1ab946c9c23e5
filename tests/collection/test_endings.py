import pytest
import torch
from batches import ready_batches
from tiny import tiny

from hf_subprune import PruneConfig, prune
from hf_subprune.collection import endings


def pruned(family, variant, layer, **settings):
    """The model, and how often one of its layers ran."""
    model, calls = tiny(family).eval(), []
    model.get_submodule(layer).register_forward_pre_hook(lambda *_: calls.append(1))
    config = PruneConfig(keep=0.6, samples=6, held_out=2, variant=variant, round_to=1, **settings)
    prune(model, ready_batches(model), config)
    return model, len(calls)


@pytest.mark.parametrize("variant", ["seq", "asym", "residual"])
@pytest.mark.parametrize(
    ("family", "layer"),
    [("llama", "model.layers.0"), ("gpt2", "transformer.h.0")],
)
def test_a_layer_does_not_run_again_for_what_its_last_block_added(monkeypatch, family, layer, variant):
    model, calls = pruned(family, variant, layer, units=("mlp",))
    monkeypatch.setattr(endings, "_HELD_BYTES", 0)
    expected, more = pruned(family, variant, layer, units=("mlp",))
    wanted = dict(expected.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, wanted[name], rtol=1e-3, atol=1e-5)
    assert calls < more


@pytest.mark.parametrize("variant", ["seq", "asym", "residual"])
@pytest.mark.parametrize(
    ("family", "inside", "again"),
    [
        ("llama", "model.layers.0.self_attn.q_proj", False),
        ("gpt2", "transformer.h.0.attn.c_attn", False),
        ("t5", "encoder.block.1.layer.0.SelfAttention.q", True),  # a bias of all heads goes on to the next layer
        ("bert", "bert.encoder.layer.0.attention.self.query", True),  # what is around its output normalises it as well
    ],
)
def test_attention_does_not_run_again_for_blocks_behind_it(monkeypatch, family, inside, again, variant):
    model, calls = pruned(family, variant, inside)
    monkeypatch.setattr(endings, "_HELD_BYTES", 0)
    expected, more = pruned(family, variant, inside)
    wanted = dict(expected.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, wanted[name], rtol=1e-3, atol=1e-5)
    assert (calls == more) if again else (calls < more)
