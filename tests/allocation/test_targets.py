import pytest
from batches import ready_batches
from tiny import tiny

from hf_subprune import PruneConfig, prune
from hf_subprune.allocation.targets import resolve
from hf_subprune.data.reading import read
from hf_subprune.discovery.discover import discover
from hf_subprune.evaluation.costs import count_macs

QUICK = {"samples": 12, "held_out": 4, "batch_size": 4, "layout": "ragged"}


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


@pytest.mark.parametrize("asked", [0.9, 400_000])
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


@pytest.mark.parametrize("settings", [{"keep": 0.5, "params": 1000}, {"macs": 0.5, "latency": 0.5}])
def test_one_target_at_a_time(settings):
    with pytest.raises(ValueError, match="exactly one of keep, params, macs, latency, size"):
        PruneConfig(**settings)


def test_latencies_are_timed_once_for_all_sizes(clock):
    model = tiny("bert")
    configs = [PruneConfig(**QUICK, latency=asked) for asked in (0.8, 0.6)]
    samples = read(model, ready_batches(model), configs[0])
    blocks = discover(model, samples.probe).blocks
    first, second = resolve(samples, blocks, configs)
    assert first.latencies and first.latencies is second.latencies
    assert {kind for kind, *_ in first.latencies} == {block.kind for block in blocks}
    for kind, width, count, seconds in first.latencies:
        narrowed = [block for block in blocks if block.kind == kind]
        removed = sum((block.units - width) * block.parameters_per_unit for block in narrowed)
        assert count == len(narrowed)
        assert seconds == pytest.approx(clock(model) - 1e-6 * removed)
