import pytest
from batches import ready_batches
from tiny import tiny

from hf_subprune import PruneConfig, prune
from hf_subprune.pruning import prune_sizes

QUICK = {"samples": 12, "held_out": 4, "batch_size": 4, "layout": "ragged"}


def widths(report):
    return [block.units_after for block in report.blocks]


def test_keep_is_met_from_below_to_within_a_unit():
    model = tiny("bert")
    report = prune(model, ready_batches(model), PruneConfig(**QUICK, keep=0.4))
    found = report.allocation
    assert (found.budget, found.target, found.unit) == ("global", "keep", "prunable parameters")
    removed = report.parameters.before - model.num_parameters()
    prunable = found.limit / 0.4
    assert found.reached == prunable - removed <= found.limit
    assert found.limit - found.reached < 0.01 * prunable
    assert found.predicted_drift > 0
    assert len(set(widths(report))) > 2


def test_latency_targets_are_met_from_one_table_of_widths(clock):
    model = tiny("bert")
    configs = [PruneConfig(**QUICK, latency=asked, budget="global", round_to=1) for asked in (0.8, 0.6)]
    full = clock(model)
    tables = []
    for config, report in zip(configs, prune_sizes(model, ready_batches(model), configs), strict=True):
        assert report.allocation.limit == pytest.approx(config.latency * full)
        assert 0.94 * config.latency * full <= clock(model) <= config.latency * full
        assert report.allocation.reached == pytest.approx(clock(model))
        tables.append(report.allocation.latencies)
    assert tables[0] and tables[0] is tables[1]
