import pytest
import torch
from batches import ready_batches
from runs_of import FAMILIES
from same import assert_same_weights
from tiny import tiny

from hf_subprune import PruneConfig, prune
from hf_subprune.models.running import call, floating_tensors

SETTINGS = {"samples": 20, "held_out": 4, "batch_size": 4, "loss_aware": False}


def assert_same(first, second, batch):
    assert_same_weights(second, first)
    expected, found = (list(floating_tensors(call(m.eval(), batch))) for m in (first, second))
    assert len(expected) == len(found) > 0
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_ragged_models_load_exactly(family, tmp_path):
    model = tiny(family)
    batches = ready_batches(model)
    report = prune(model, batches, PruneConfig(**SETTINGS, budget="global", layout="ragged"))
    assert report.layout == "ragged"
    model.save_pretrained(tmp_path)
    assert_same(model, type(model).from_pretrained(tmp_path), batches[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_mlp_widths_load_exactly_as_stock(family, tmp_path):
    model = tiny(family)
    batches = ready_batches(model)
    report = prune(model, batches, PruneConfig(**SETTINGS, units=("mlp",), layout="stock"))
    assert report.layout == "stock"
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in (tmp_path / "config.json").read_text()
    assert_same(model, type(model).from_pretrained(tmp_path), batches[0])
