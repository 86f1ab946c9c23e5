import copy
import re
from dataclasses import replace

import pytest
import torch
from batches import ready_batches
from tiny import tiny

from hf_subprune import PruneConfig, prune
from hf_subprune.allocation.families import Families
from hf_subprune.allocation.targets import keep_target
from hf_subprune.allocation.widths import choose_widths
from hf_subprune.discovery.discover import discover

QUICK = {"samples": 12, "held_out": 4, "batch_size": 4, "layout": "ragged"}


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


def alike(blocks):
    """As one width a kind, as where the config says them."""
    kinds = {block.kind: tuple(b.name for b in blocks if b.kind == block.kind) for block in blocks}
    return Families(tuple(kinds.values()), even=True)


@pytest.fixture(scope="module")
def wide():
    """Blocks of 2048 neurons, and what each loses."""
    blocks = discover(tiny("llama", num_hidden_layers=2, intermediate_size=2048)).blocks
    return blocks, {b.name: ((b.units // 4, 1.0), (b.units // 2, 0.1), (b.units, 0.0)) for b in blocks}


@pytest.mark.parametrize(("keep", "width"), [(0.5, 1024), (0.47, 960), (0.49, 1000), (0.2021, 413)])
def test_widths_are_as_round_as_they_can_be_within_half_a_percent_of_the_target(wide, keep, width):
    blocks, losses = wide
    config = PruneConfig(keep={"mlp": keep})
    widths = choose_widths(blocks, keep_target(blocks, config), config, alike(blocks), losses)
    assert {widths[block.name] for block in blocks if block.kind == "mlp"} == {width}
    assert all(widths[block.name] == block.units for block in blocks if block.kind == "attention")


@pytest.mark.parametrize("families", [alike, Families.single])
@pytest.mark.parametrize("budget", ["global", "equal_loss"])
@pytest.mark.parametrize("keep", [0.33, 0.5, 0.81])
def test_what_is_kept_is_within_half_a_percent_of_the_target_from_below(wide, keep, budget, families):
    blocks, losses = wide
    config = PruneConfig(keep=keep, budget=budget)
    target = keep_target(blocks, config)
    widths = choose_widths(blocks, target, config, families(blocks), losses)
    assert 0.995 * target.limit <= target.cost(widths) <= target.limit


@pytest.mark.parametrize("families", [alike, Families.single])
def test_the_smallest_fraction_that_is_advised_can_be_kept(wide, families):
    blocks, losses = wide
    found = families(blocks)

    def chosen(keep):
        config = PruneConfig(keep=keep)
        return choose_widths(blocks, keep_target(blocks, config), config, found, losses)

    with pytest.raises(ValueError, match="out of reach") as refused:
        chosen(1e-4)
    advised = float(re.search(r"Keep at least (0\.\d+)\.", str(refused.value)).group(1))
    assert chosen(advised)
    with pytest.raises(ValueError, match=f"Keep at least {advised}"):
        chosen(advised - 1e-4)


def test_what_coarse_steps_do_not_reach_finer_ones_do(wide):
    blocks, losses = wide
    config = PruneConfig(keep={"mlp": 0.02})  # 40 neurons, and steps of 64 come first
    widths = choose_widths(blocks, keep_target(blocks, config), config, alike(blocks), losses)
    assert {widths[block.name] for block in blocks if block.kind == "mlp"} == {40}


def test_what_was_asked_to_be_rounded_is_rounded(wide):
    blocks, losses = wide
    config = PruneConfig(keep={"mlp": 0.49}, round_to=128)
    widths = choose_widths(blocks, keep_target(blocks, config), config, alike(blocks), losses)
    assert {widths[block.name] for block in blocks if block.kind == "mlp"} == {896}


@pytest.mark.parametrize("budget", ["global", "equal_loss"])
def test_a_kind_of_which_there_is_no_block_takes_nothing(wide, budget):
    blocks, losses = wide
    mlps = [block for block in blocks if block.kind == "mlp"]
    config = PruneConfig(keep={"mlp": 0.5, "attention": 0.5}, budget=budget)
    assert set(choose_widths(mlps, keep_target(mlps, config), config, alike(mlps), losses).values()) == {1024}


def test_no_block_keeps_less_than_a_tenth_of_an_equal_share(wide):
    blocks, _ = wide
    mlps = [block for block in blocks if block.kind == "mlp"]
    idle, needed = mlps
    losses = {idle.name: ((2048, 0.0),), needed.name: ((1, 1.0), (2048, 0.0))}
    config = PruneConfig(keep=0.5, units=("mlp",))
    widths = choose_widths(mlps, keep_target(mlps, config), config, Families.single(mlps), losses)
    assert 0.05 * 2048 <= widths[idle.name] < 0.06 * 2048
    assert widths[needed.name] > 0.9 * 2048


def test_blocks_that_stay_whole_and_widths_that_are_refused_are_not_chosen(wide):
    blocks, losses = wide
    attention = {block.name: block.units for block in blocks if block.kind == "attention"}
    losses = {**losses, **dict.fromkeys(attention, ((1, 0.0),))}  # nothing is lost with them
    config = PruneConfig(keep=0.9)
    target, even = keep_target(blocks, config), alike(blocks)
    refused = replace(even, refused=frozenset((name, 1, 1) for name in attention))
    whole = replace(even, whole=frozenset(attention))
    for families, expected in ((even, {1}), (refused, {2}), (whole, {3})):
        widths = choose_widths(blocks, target, config, families, losses)
        assert {widths[name] for name in attention} == expected


@pytest.mark.parametrize(
    ("families", "budget", "goes"),
    [(Families.single, "global", True), (Families.single, "equal_loss", False), (alike, "global", False)],
)
def test_a_block_goes_where_others_would_lose_more_if_widths_differ(wide, families, budget, goes):
    blocks, losses = wide
    first, *_ = attention = [block for block in blocks if block.kind == "attention"]
    losses = losses | {block.name: ((0, 1e-3), (1, 0.1), (block.units, 0.0)) for block in attention[:1]}
    config = PruneConfig(keep=0.6, budget=budget)
    target = keep_target(blocks, config)
    widths = choose_widths(blocks, target, config, families(blocks), losses)
    assert (widths[first.name] == 0) == goes
    assert all(width > 0 for name, width in widths.items() if name != first.name)
    assert 0.99 * target.limit <= target.cost(widths) <= target.limit


def test_a_block_that_must_keep_a_unit_does(wide):
    blocks, losses = wide
    kept = [replace(block, removable=False) for block in blocks]
    losses = {name: ((0, 0.0), *points) for name, points in losses.items()}
    config = PruneConfig(keep=0.6)
    assert all(choose_widths(kept, keep_target(kept, config), config, Families.single(kept), losses).values())
