import copy

import pytest
import torch
from batches import ready_batches
from tiny import tiny

from hf_subprune import PruneConfig, prune
from hf_subprune.allocation import targets
from hf_subprune.evaluation.costs import count_macs
from hf_subprune.pruning import prune_sizes

QUICK = {"samples": 20, "held_out": 4, "batch_size": 4, "layout": "ragged"}


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


@pytest.mark.parametrize("budget", ["uniform", "equal_loss", "global"])
def test_params_and_size_count_the_whole_model(budget):
    model = tiny("llama")
    full = model.num_parameters()
    asked = int(0.8 * full)
    report = prune(model, ready_batches(model), PruneConfig(**QUICK, params=asked, budget=budget))
    assert 0.6 * full < model.num_parameters() <= asked
    assert report.allocation.reached == model.num_parameters()

    model = tiny("llama")
    size = 2 * asked
    report = prune(model, ready_batches(model), PruneConfig(**QUICK, size=f"{size} B in bf16", budget=budget))
    assert 2 * model.num_parameters() <= report.allocation.reached <= size


@pytest.mark.parametrize("asked", [0.9, 600_000])
def test_macs_are_counted_on_the_pruned_model(asked):
    model = tiny("llama")
    batches = ready_batches(model)
    full = count_macs(model, batches[-1])
    limit = asked * full if asked <= 1 else asked
    report = prune(model, batches, PruneConfig(**QUICK, macs=asked, budget="global"))
    assert report.allocation.limit == pytest.approx(limit)
    assert report.allocation.reached == pytest.approx(count_macs(model, batches[-1]))
    assert 0.95 * limit < report.allocation.reached <= limit
    assert "tokens" in report.allocation.unit


def test_latency_targets_are_met_from_one_table_of_widths(monkeypatch, clock):
    tables = []

    def latencies(*given):
        tables.append(original(*given))
        return tables[-1]

    original = targets._latencies
    monkeypatch.setattr(targets, "_latencies", latencies)
    model = tiny("bert")
    configs = [PruneConfig(**QUICK, latency=asked, budget="global", round_to=1) for asked in (0.8, 0.6)]
    full = clock(model)
    for config, report in zip(configs, prune_sizes(model, ready_batches(model), configs), strict=True):
        assert report.allocation.limit == pytest.approx(config.latency * full)
        assert 0.94 * config.latency * full <= clock(model) <= config.latency * full
        assert report.allocation.reached == pytest.approx(clock(model))
        assert report.allocation.latencies == tables[0][2]
    assert len(tables) == 1


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
def test_what_cannot_be_reached_is_said_before_any_work(monkeypatch, settings, message):
    model = tiny("bert")
    before = copy.deepcopy(model.state_dict())
    monkeypatch.setattr("hf_subprune.allocation.survey.collect", None)
    monkeypatch.setattr("hf_subprune.allocation.survey.output_metrics", None)
    with pytest.raises(ValueError, match=message):
        prune(model, ready_batches(model), PruneConfig(**QUICK, **settings))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("settings", [{"keep": 0.5, "params": 1000}, {"macs": 0.5, "latency": 0.5}])
def test_one_target_at_a_time(settings):
    with pytest.raises(ValueError, match="exactly one of keep, params, macs, latency, size"):
        PruneConfig(**settings)


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


def test_several_sizes_come_from_one_calibration(monkeypatch):
    import hf_subprune.allocation.survey as calibrated

    model = tiny("bert")
    batches = ready_batches(model)
    before = {name: (id(p), p.detach().clone()) for name, p in model.named_parameters()}
    config_before = model.config.to_dict()
    configs = [PruneConfig(**QUICK, keep=keep, variant="layer") for keep in (0.75, 0.5)]
    collected, collect = [], calibrated.collect
    monkeypatch.setattr(
        calibrated, "collect", lambda *args, **options: collected.append(1) or collect(*args, **options)
    )
    together = [(r, copy.deepcopy(model.state_dict())) for r in prune_sizes(model, batches, configs)]
    assert len(collected) == 1
    assert {name: id(p) for name, p in model.named_parameters()} == {name: old[0] for name, old in before.items()}
    assert all(torch.equal(p, before[name][1]) for name, p in model.named_parameters())
    assert model.config.to_dict() == config_before
    for config, (report, state) in zip(configs, together, strict=True):
        alone = tiny("bert")
        single = prune(alone, batches, config)
        assert widths(single) == widths(report)
        assert all(torch.equal(value, state[name]) for name, value in alone.state_dict().items())
    first, second = (report for report, _ in together)
    assert first.parameters.after > second.parameters.after


def test_an_abandoned_size_is_taken_back():
    model = tiny("bert")
    full = model.num_parameters()
    sizes = prune_sizes(model, ready_batches(model), [PruneConfig(**QUICK)])
    next(sizes)
    assert model.num_parameters() < full
    sizes.close()
    assert model.num_parameters() == full


def test_sizes_may_differ_in_size_only():
    model = tiny("bert")
    configs = [PruneConfig(**QUICK), PruneConfig(**{**QUICK, "samples": 10}, variant="seq")]
    with pytest.raises(ValueError, match="differ in samples, variant"):
        next(prune_sizes(model, ready_batches(model), configs))
