import copy

import pytest
import torch
from batches import ready_batches
from tiny import tiny

from hf_subprune import PruneConfig, prune

QUICK = {"samples": 20, "held_out": 4, "batch_size": 4, "layout": "ragged"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"params": 1000}, r"params=1000 is out of reach: it allows 1000 parameters, and the smallest width .* makes"),
        ({"size": "1 kB"}, r"size=1 kB is out of reach"),
        ({"macs": 0.01}, r"macs=0\.01 is out of reach"),
        ({"keep": 0.001}, r"keep=0\.001 is out of reach.* Keep at least 0\.\d+"),
        ({"params": 1000, "budget": "uniform"}, r"would leave block .* with none"),
    ],
)
def test_what_cannot_be_reached_is_said_before_any_work(computed, settings, message):
    model = tiny("bert")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        prune(model, ready_batches(model), PruneConfig(**QUICK, **settings))
    assert computed.names == ["blocks"]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_stock_layout_gets_one_width_a_kind():
    model = tiny("llama")
    report = prune(model, ready_batches(model), PruneConfig(**{**QUICK, "layout": "stock"}, keep=0.6))
    assert report.layout == "stock"
    assert report.allocation.budget == "global"
    for kind in ("mlp", "attention"):
        assert len({b.units_after for b in report.blocks if b.kind == kind}) == 1
    assert report.allocation.reached <= report.allocation.limit


def test_kinds_keep_budgets_of_their_own():
    model = tiny("bert")
    report = prune(model, ready_batches(model), PruneConfig(**QUICK, keep={"mlp": 0.5}))
    mlps = [b for b in report.blocks if b.kind == "mlp"]
    assert all(b.units_after == b.units_before for b in report.blocks if b.kind == "attention")
    assert sum(b.units_after for b in mlps) == sum(b.units_before for b in mlps) // 2
