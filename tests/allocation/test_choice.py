from dataclasses import replace

import pytest
from batches import ready_batches
from tiny import tiny

from hf_subprune import PruneConfig, prune
from hf_subprune.allocation.choice import choose
from hf_subprune.allocation.surveying import take_survey
from hf_subprune.data.reading import read
from hf_subprune.models.session import session
from hf_subprune.pruning import prune_sizes
from hf_subprune.runs.workspace import Workspace

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


@pytest.mark.parametrize(("dearer", "kinds"), [(1, {"attention", "mlp"}), (2, {"mlp"})])
def test_one_kind_of_units_is_removed_where_several_are_predicted_to_lose_hardly_less(dearer, kinds):
    model = tiny("qwen3", hidden_size=64, num_attention_heads=8, num_key_value_heads=8, intermediate_size=128)
    config = PruneConfig(samples=12, held_out=4, batch_size=4, keep=0.8)
    with session(model):
        survey = take_survey(read(model, ready_batches(model), config, None), [config], None, Workspace())

        def points(block):
            factor = dearer if block.kind == "attention" else 1
            return tuple((width, factor * (1 - width / block.units) ** 2) for width in range(block.units + 1))

        losses = {block.name: points(block) for block in survey.candidates}
        survey = replace(survey, losses=losses, query_losses={})
        widths = choose(survey, config, Workspace())
        allocation = widths.allocation(survey, 0.0)
    assert {block.kind for block in widths.blocks} == kinds
    best = min(loss for _, loss in allocation.alternatives)
    assert allocation.alternatives[0][1] == pytest.approx(allocation.predicted_drift)
    assert best <= allocation.predicted_drift <= 1.25 * best
    assert (best < allocation.predicted_drift) == (kinds == {"mlp"})
