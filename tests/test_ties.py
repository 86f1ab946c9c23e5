"""Blocks that must all keep the same units: found, pruned and stored together."""

from pkgutil import resolve_name

import pytest
import torch
from batches import ready_batches
from same import assert_same_weights
from tiny import tiny
from torch import nn
from transformers import T5Config, T5Model

from hf_subprune import PruneConfig, prune
from hf_subprune.blocks import groups_of
from hf_subprune.discovery.discover import discover
from hf_subprune.discovery.probe_inputs import probe_inputs
from hf_subprune.models.running import floating_tensors
from hf_subprune.pruning import prune_sizes
from hf_subprune.surgery.verification import verify

QUICK = {"samples": 12, "held_out": 4, "batch_size": 4}

TIES = {
    "t5": {
        "encoder.block.*.layer.0.SelfAttention",
        "decoder.block.*.layer.0.SelfAttention",
        "decoder.block.*.layer.1.EncDecAttention",
    },
    "mpnet": {"encoder.layer.*.attention.attn"},
}


def heads(model):
    return [block for block in discover(model).blocks if block.kind == "attention"]


@pytest.mark.parametrize("family", TIES)
def test_the_heads_of_all_layers_of_a_stack_are_tied(family):
    discovery = discover(tiny(family))
    assert not discovery.refusals
    groups = [group.blocks for group in groups_of(discovery.blocks) if group.blocks[0].kind == "attention"]
    assert {group[0].tie for group in groups} == TIES[family]
    assert all(len(group) == 2 for group in groups)
    assert all(block.tie is None for block in discovery.blocks if block.kind == "mlp")


@pytest.mark.parametrize("count", [2, 3, 4])
def test_heads_that_hand_on_their_number_are_tied_however_few_they_are(count):
    # The bias of the first decoder layer's attention to the encoder is zero, but has as many entries as it has heads.
    model = tiny("t5", num_heads=count, num_layers=2)
    found = [block.tie for block in heads(model) if block.name.endswith("EncDecAttention")]
    assert found == ["decoder.block.*.layer.1.EncDecAttention"] * 2


@pytest.mark.parametrize("family", TIES)
def test_the_bias_table_belongs_to_the_first_layer_alone(family):
    model = tiny(family)
    tables = {name for name, _ in model.named_parameters() if "relative_attention_bias" in name}
    shared = {piece.tensor: block for block in heads(model) for piece in block.slices if piece.shared}
    assert set(shared) == tables
    for table, block in shared.items():
        first, *others = (one for one in heads(model) if one.tie == block.tie)
        assert first.name == block.name
        columns = model.get_parameter(table).shape[0]
        assert {one.parameters_per_unit for one in others} == {first.parameters_per_unit - columns}


def test_tied_blocks_can_only_be_verified_with_equal_units():
    model = tiny("mpnet")
    blocks = heads(model)
    kept = {block.name: [0, i + 1] for i, block in enumerate(blocks)}
    with pytest.raises(ValueError, match=r"are tied \('encoder\.layer\.\*\.attention\.attn'\)"):
        verify(model, blocks, kept, probe_inputs(model))
    with pytest.raises(RuntimeError, match="cannot run"):
        verify(model, blocks[1:2], kept, probe_inputs(model))


class Table(nn.Module):
    """A gate for each neuron, read by all layers."""

    def __init__(self, elsewhere: bool = False, reverse: bool = False):
        super().__init__()
        self.gate = nn.Parameter(torch.randn(20))
        self.ups, self.downs = (nn.ModuleList(nn.Linear(*size) for _ in range(3)) for size in ((12, 20), (20, 12)))
        self.layers = nn.ModuleList(nn.ModuleList(pair) for pair in zip(self.ups, self.downs, strict=True))
        del self.ups, self.downs
        self.elsewhere, self.reverse = elsewhere, reverse

    def forward(self, x):
        for i, (up, down) in enumerate(self.layers):
            gate = self.gate.flip(0) if self.reverse and i == 1 else self.gate
            x = x + down(up(x).relu() * gate)
        return x * self.gate.sum() if self.elsewhere else x


X = {"x": torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0))}


def test_neurons_that_share_a_gate_are_tied():
    blocks = discover(Table(), X).blocks
    assert {block.tie for block in blocks} == {"layers.*.mlp"} and len(blocks) == 3
    assert [any(piece.tensor == "gate" for piece in block.slices) for block in blocks] == [True, False, False]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [({"elsewhere": True}, '"the model\'s output"'), ({"reverse": True}, "rows of 'gate'")],
)
def test_what_is_shared_otherwise_is_refused(settings, reason):
    discovery = discover(Table(**settings), X)
    assert not discovery.blocks
    assert len(discovery.refusals) == 3 and all(reason in one.reason for one in discovery.refusals)


def outputs(model):
    with torch.no_grad():
        return list(floating_tensors(model(**probe_inputs(model))))


def kept_by_tie(model, report):
    ties = {block.name: block.tie for block in discover(model).blocks}
    kept = {}
    for block in report.blocks:
        if ties[block.name]:
            kept.setdefault(ties[block.name], []).append(block.kept_units)
    return kept


@pytest.mark.parametrize("variant", ["layer", "seq", "asym"])
@pytest.mark.parametrize("family", TIES)
def test_all_layers_of_a_stack_keep_the_same_heads(family, variant):
    model = tiny(family)
    report = prune(model, ready_batches(model), PruneConfig(**QUICK, variant=variant, budget="uniform"))
    kept = kept_by_tie(tiny(family), report)
    assert set(kept) == TIES[family]
    assert all(len(set(heads)) == 1 and len(heads[0]) == 2 for heads in kept.values())
    tied_reports = [block for block in report.blocks if block.kind == "attention"]
    assert {block.method for block in tied_reports} == {"greedy, tied"}
    assert all(0 < block.guarantee <= 1 and block.held_out_error > 0 for block in tied_reports)


@pytest.mark.parametrize("family", TIES)
def test_new_weights_beat_plain_removal(family):
    errors = {}
    for reweight in (True, False):
        model = tiny(family)
        config = PruneConfig(**QUICK, reweight=reweight, units=("attention",), budget="uniform")  # the same widths
        errors[reweight] = [block.fitted_error for block in prune(model, ready_batches(model), config).blocks]
    assert all(new <= old for new, old in zip(errors[True], errors[False], strict=True))  # alike where they stay
    assert sum(errors[True]) < 0.8 * sum(errors[False])


@pytest.mark.parametrize("settings", [{"layout": "ragged", "budget": "global"}, {"macs": 0.7}, {"params": 36_000}])
def test_every_target_and_budget_keeps_ties_together(settings):
    model = tiny("t5")
    report = prune(model, ready_batches(model), PruneConfig(**QUICK, **settings))
    kept = kept_by_tie(tiny("t5"), report)
    assert all(len(set(heads)) == 1 for heads in kept.values())
    assert any(len(heads[0]) < 4 for heads in kept.values())
    assert report.allocation.reached <= report.allocation.limit


def test_losses_of_a_tie_are_measured_with_all_of_it_pruned():
    model, calls = tiny("mpnet"), []

    def quality(model):
        calls.append({layer.attention.attn.num_attention_heads for layer in model.encoder.layer})
        return -float(outputs(model)[0].square().mean())

    config = PruneConfig(**QUICK, budget="equal_loss", units=("attention",))
    report = prune(model, ready_batches(model), config, evaluation=quality)
    assert calls[0] == {4} and sorted(map(tuple, calls[1:])) == [(1,), (2,)]
    assert len({block.predicted for block in report.blocks}) == 1


@pytest.mark.parametrize(("family", "layout"), [("t5", "stock"), ("t5", "ragged"), ("mpnet", "ragged")])
def test_what_was_pruned_loads_again(tmp_path, family, layout):
    model = tiny(family)
    report = prune(model, ready_batches(model), PruneConfig(**QUICK, layout=layout, budget="uniform"))
    assert report.layout == layout
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert_same_weights(again, model)
    torch.testing.assert_close(outputs(again), outputs(model))
    if layout == "stock":
        assert again.config.num_heads == 2 and not hasattr(again.config, "subprune")


def test_encoder_and_decoder_may_keep_different_numbers_of_heads(tmp_path):
    model = tiny("t5")
    config = PruneConfig(**QUICK, include=("encoder.*SelfAttention",))
    assert prune(model, ready_batches(model), config).layout == "ragged"
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert_same_weights(again, model)
    torch.testing.assert_close(outputs(again), outputs(model))
    assert model.encoder.block[1].layer[0].SelfAttention.n_heads == 2
    assert model.decoder.block[1].layer[0].SelfAttention.n_heads == 4


def test_a_pruned_t5_generates_the_same_with_a_cache_and_without():
    model = tiny("t5")
    prune(model, ready_batches(model), PruneConfig(**QUICK))
    prompt = {"input_ids": torch.randint(3, 100, (2, 6), generator=torch.Generator().manual_seed(0))}
    arguments = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    cached = model.generate(**prompt, **arguments, use_cache=True)
    assert torch.equal(cached, model.generate(**prompt, **arguments, use_cache=False))


@pytest.mark.parametrize("family", TIES)
def test_a_size_is_taken_back_exactly(family):
    model = tiny(family)
    before, expected = {name: (p, p.detach().clone()) for name, p in model.named_parameters()}, outputs(model)
    configs = [PruneConfig(**QUICK, keep=keep, budget="uniform") for keep in (0.5, 0.75)]
    for report in prune_sizes(model, ready_batches(model), configs):
        assert {len(heads[0]) for heads in kept_by_tie(tiny(family), report).values()} < {2, 3}
        assert not torch.equal(outputs(model)[0], expected[0])
    for name, parameter in model.named_parameters():
        assert parameter is before[name][0] and torch.equal(parameter, before[name][1])
    assert all(torch.equal(one, other) for one, other in zip(outputs(model), expected, strict=True))


@pytest.mark.parametrize(
    ("stage", "passes"),  # the third solution is that of the first block without a tie
    [("block.choose_together", 0), ("block.solve_problem", 3), ("outcome.verify", 0), ("outcome.drift", 0)],
)
@pytest.mark.parametrize("variant", ["layer", "asym"])
def test_a_failure_restores_the_model(monkeypatch, stage, passes, variant):
    model = tiny("mpnet")
    before, calls = dict(model.named_parameters()), []
    stage = f"hf_subprune.solving.{stage}"
    run = resolve_name(stage)

    def fail(*args, **kwargs):
        calls.append(1)
        if len(calls) > passes:
            raise RuntimeError("on purpose")
        return run(*args, **kwargs)

    monkeypatch.setattr(stage, fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        prune(model, ready_batches(model), PruneConfig(**QUICK, variant=variant, budget="uniform"))
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert {layer.attention.attn.num_attention_heads for layer in model.encoder.layer} == {4}


@pytest.mark.parametrize("settings", [{"include": ("encoder.layer.1.*",)}, {"exclude": ("*.0.attention.attn",)}])
def test_a_part_of_a_tie_cannot_be_pruned(settings):
    model = tiny("mpnet")
    with pytest.raises(
        ValueError, match=r"'encoder\.layer\.\*\.attention\.attn' must all keep the same units.*all of them"
    ):
        prune(model, ready_batches(model), PruneConfig(**QUICK, **settings))


def test_of_a_tie_the_last_layer_can_go_and_the_others_keep_theirs():
    model = tiny("t5")
    names = [b.name for b in discover(model).blocks if b.tie and b.name.startswith("encoder")]
    config = {**QUICK, "budget": "uniform", "keep": 0.5}
    report = prune(model, ready_batches(model), PruneConfig(**config, remove=(names[-1],)))
    blocks = {b.name: b for b in report.blocks}
    assert all(b.units_after == len(b.kept_units) for b in report.blocks)
    assert blocks[names[-1]].units_after == 0 < blocks[names[0]].units_after == 2
    assert report.parameters.after == model.num_parameters()
    with pytest.raises(ValueError, match=f"`remove` names {names[0]}, which must keep a unit"):
        prune(tiny("t5"), ready_batches(tiny("t5")), PruneConfig(**config, remove=(names[0],)))


def test_a_tie_can_be_left_whole_by_its_pattern():
    model = tiny("mpnet")
    report = prune(model, ready_batches(model), PruneConfig(**QUICK, exclude=tuple(TIES["mpnet"])))
    assert {block.kind for block in report.blocks} == {"mlp"}


def test_layers_that_share_a_bias_are_tied_without_a_check_of_each():
    config = T5Config(d_model=32, d_ff=48, d_kv=8, num_layers=16, num_heads=4, vocab_size=100)
    model = T5Model(config).eval()
    forwards = []
    model.register_forward_pre_hook(lambda *_: forwards.append(None))
    blocks = discover(model).blocks
    assert len(forwards) < len(blocks) == 80
    assert {block.tie for block in blocks} > {"encoder.block.*.layer.0.SelfAttention"}
