import pytest
import torch
from batches import ready_batches
from tiny import tiny

from hf_subprune import PruneConfig, prune
from hf_subprune.allocation import losses

QUICK = {"samples": 12, "held_out": 4, "batch_size": 4, "layout": "ragged"}


def widths(report):
    return [block.units_after for block in report.blocks]


def test_labels_decide_equal_loss_when_an_evaluation_is_given():
    model = tiny("bert")
    calls = []

    def evaluation(candidate):
        """Only the last block matters to this user."""
        calls.append(1)
        mlp = candidate.bert.encoder.layer[-1].intermediate.dense.weight
        return -float(56 - mlp.shape[0])

    config = PruneConfig(**QUICK, keep=0.5, budget="equal_loss", units=("mlp",))
    report = prune(model, ready_batches(model), config, evaluation=evaluation)
    assert len(calls) == 1 + 2 * len(report.blocks)
    assert widths(report)[-1] > 2 * max(widths(report)[:-1])
    with pytest.raises(ValueError, match="equal_loss"):
        prune(tiny("bert"), ready_batches(model), PruneConfig(**QUICK), evaluation=evaluation)


@pytest.mark.parametrize("variant", ["asym", "residual"])
@pytest.mark.parametrize(("family", "layer"), [("llama", "model.layers.1"), ("bart", "model.decoder.layers.0")])
def test_the_original_does_not_run_again_where_what_it_puts_out_is_kept(monkeypatch, family, layer, variant):
    def pruned():
        model, calls = tiny(family).eval(), []
        model.get_submodule(layer).register_forward_pre_hook(lambda *_: calls.append(1))
        prune(model, ready_batches(model), PruneConfig(**QUICK, keep=0.6, variant=variant))
        return model, len(calls)

    model, calls = pruned()
    monkeypatch.setattr(losses, "_TARGET_BYTES", 0)
    expected, more = pruned()
    assert calls < more
    wanted = dict(expected.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, wanted[name], rtol=1e-3, atol=1e-5)
