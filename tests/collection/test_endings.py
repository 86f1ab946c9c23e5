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
