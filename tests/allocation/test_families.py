import pytest
import torch
from batches import ready_batches
from tiny import tiny
from transformers import AutoModelForCausalLM

from hf_subprune import PruneConfig, prune

QUICK = {"samples": 20, "held_out": 4, "batch_size": 4}


@pytest.mark.parametrize("budget", ["auto", "uniform"])
def test_a_sublayer_that_is_asked_to_go_is_gone_and_the_rest_shares_what_is_left(budget):
    model = tiny("llama")
    report = prune(
        model, ready_batches(model), PruneConfig(**QUICK, keep=0.7, remove=("*.1.self_attn",), budget=budget)
    )
    (gone,) = [b for b in report.blocks if b.name == "model.layers.1.self_attn"]
    assert gone.units_after == 0 and gone.kept_units == ()
    assert report.layout == "ragged"
    assert 0.9 * report.allocation.limit < report.allocation.reached <= report.allocation.limit


def test_a_whole_layer_that_goes_leaves_a_stock_model(tmp_path):
    model = tiny("llama")
    batches = ready_batches(model)
    report = prune(model, batches, PruneConfig(**QUICK, keep=1.0, remove=("model.layers.1.*",)))
    assert report.layout == "stock"
    assert model.config.num_hidden_layers == 2
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**batches[0]).logits, model(**batches[0]).logits)


def test_what_cannot_go_is_named():
    model = tiny("resnet")
    with pytest.raises(ValueError, match=r"`remove` names .*, which must keep a unit"):
        prune(model, ready_batches(model), PruneConfig(**QUICK, units=("channels",), remove=("*",)))
