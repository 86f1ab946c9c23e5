"""Query heads as units of grouped-query attention, besides whole key/value heads."""

import pytest
import torch
from batches import ready_batches
from fresh import run_fresh
from same import assert_same_weights
from tiny import tiny
from torch import nn

from hf_subprune import PruneConfig, PruneReport, prune
from hf_subprune.discovery.discover import discover
from hf_subprune.discovery.probe_inputs import probe_inputs
from hf_subprune.models.running import call
from hf_subprune.storage.remote_code import write_remote_code
from hf_subprune.surgery.edits import shrink
from hf_subprune.surgery.verification import verify

SETTINGS = {"samples": 12, "held_out": 4, "batch_size": 4, "units": ("attention",)}


def query_blocks(model: nn.Module) -> list:
    return [block.queries for block in discover(model).blocks if block.queries is not None]


def some_heads(blocks) -> dict[str, torch.Tensor]:
    """One query head of each group in one layer, all but one in the next, others in each group."""
    kept = {}
    for i, block in enumerate(blocks):
        size = block.units // block.sets
        count = 1 if i % 2 else size - 1
        heads = [start + torch.arange(count).add(start + i).remainder(size) for start in range(0, block.units, size)]
        kept[block.name] = torch.cat(heads).sort().values
    return kept


def test_query_heads_leave_keys_and_values_alone():
    block = query_blocks(tiny("llama"))[0]  # 6 query heads of 8 columns, 3 key/value heads
    assert (block.units, block.sets) == (6, 3)
    assert block.columns.tolist() == [list(range(8 * u, 8 * u + 8)) for u in range(6)]
    assert {piece.tensor.split(".")[-2]: tuple(piece.index.shape) for piece in block.slices} == {
        "o_proj": (6, 8),
        "q_proj": (6, 8),
    }
    assert [(one.name, one.before, int(one.per_unit * 3)) for one in block.attributes] == [
        ("num_key_value_groups", 2, 1)
    ]


@pytest.mark.parametrize("heads", [4, 6])
def test_the_queries_of_a_group_do_not_follow_two_key_value_heads(heads):
    # With one key/value head left of two, broadcasting hides a wrong number of queries for each.
    blocks = discover(tiny("qwen2", num_attention_heads=heads, num_key_value_heads=2)).blocks
    attention = [block for block in blocks if block.kind == "attention"]
    assert [block.attributes for block in attention] == [()] * 2
    assert all(block.queries is not None for block in attention)


@pytest.mark.parametrize("heads", [(4, 2), (6, 2), (6, 3)])
def test_a_probe_without_a_mask_finds_the_number_of_queries_that_a_mask_needs(heads):
    model = tiny("llama", num_attention_heads=heads[0], num_key_value_heads=heads[1], attn_implementation="sdpa")
    tokens = torch.arange(1, 9).view(2, 4)
    blocks = [block for block in discover(model, {"input_ids": tokens}).blocks if block.kind == "attention"]
    shrink(model, blocks[0].queries, blocks[0].queries.first(heads[1]))
    shrink(model, blocks[1], [0])
    groups = [model.get_submodule(block.name).num_key_value_groups for block in blocks]
    assert groups == [1, heads[0] // heads[1]]
    padded = call(model, {"input_ids": tokens, "attention_mask": torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])})
    assert torch.allclose(padded.logits[1], call(model, {"input_ids": tokens[1:]}).logits[0], atol=1e-5)


def test_each_group_must_keep_equally_many():
    model = tiny("llama")
    with pytest.raises(ValueError, match=r"equally many units of each of its 3 sets, found \[2, 1, 0\]"):
        shrink(model, query_blocks(model)[0], [0, 1, 2])


@pytest.mark.parametrize(
    ("family", "implementation"),
    [
        *[(family, "sdpa") for family in ("llama", "mistral", "qwen3", "gemma3", "phi3", "falcon")],
        *[(family, "eager") for family in ("llama", "qwen2", "gemma2", "falcon")],
    ],
)
def test_query_heads_shrink_exactly_by_other_numbers_in_each_layer(family, implementation):
    heads = {"hidden_size": 96, "num_attention_heads": 12}  # 4 of each key/value head
    model = tiny(family, **heads, attn_implementation=implementation)
    blocks = query_blocks(model)
    assert [(block.units, block.sets) for block in blocks] == [(12, 3)] * 2
    kept = some_heads(blocks)
    assert verify(model, blocks, kept, probe_inputs(model)) < 1e-5
    before = model.num_parameters()
    for block in blocks:
        shrink(model, block, kept[block.name])
    assert before - model.num_parameters() == sum(
        (block.units - len(kept[block.name])) * block.parameters_per_unit for block in blocks
    )
    prompt = {"input_ids": torch.full((1, 3), 5), "min_new_tokens": 5, "max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(**prompt, use_cache=True), model.generate(**prompt, use_cache=False))


def without_heads(family: str, idle: str, **overrides) -> nn.Module:
    """A model in which one query head of every group is idle, or one key/value head with all of its queries."""
    model = tiny(family, **overrides)
    for layer in model.model.layers:
        heads = layer.self_attn.o_proj.weight.data.view(48, 3, 2, 8)  # outputs, key/value heads, queries of each
        if idle == "query heads":
            heads[:, torch.arange(3), torch.tensor([0, 1, 1])] = 0
        else:
            heads[:, 1] = 0
    return model


@pytest.mark.parametrize(("layout", "loss_aware"), [("ragged", True), ("ragged", False), ("auto", True)])
@pytest.mark.parametrize("idle", ["query heads", "key/value heads"])
def test_the_units_that_lose_less_are_removed(idle, loss_aware, layout, tmp_path):
    model = without_heads("qwen3", idle)
    batches = ready_batches(model)
    config = PruneConfig(**SETTINGS, keep=0.67, layout=layout, budget="uniform", loss_aware=loss_aware)
    report = prune(model, batches, config)
    for block in report.blocks:
        assert block.fitted_error < 1e-6
        if idle == "query heads":
            assert (block.units_before, block.kept_units, block.method[-11:]) == (6, (1, 2, 4), "query heads")
        else:
            assert (block.units_before, block.kept_units) == (3, (0, 2))
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.out_features == (24 if idle == "query heads" else 32)
    assert attention.k_proj.out_features == (24 if idle == "query heads" else 16)
    assert report.drift["relative_error"] < 1e-3
    assert report.layout == ("ragged" if layout == "ragged" else "stock")
    assert PruneReport.from_dict(report.to_dict()) == report
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert_same_weights(again, model)
    torch.testing.assert_close(call(again, batches[0]).logits, call(model, batches[0]).logits)
    if layout == "auto":
        assert "subprune" not in (tmp_path / "config.json").read_text()
        heads = (model.config.num_attention_heads, model.config.num_key_value_heads)
        assert heads == ((3, 3) if idle == "query heads" else (4, 2))


def test_each_layer_loses_the_units_that_suit_it_where_layers_may_differ():
    model = without_heads("qwen3", "query heads")
    heads = model.model.layers[1].self_attn.o_proj.weight.data.view(48, 3, 2, 8)
    heads.normal_()[:, 1] = 0
    config = PruneConfig(**SETTINGS, keep=0.67, layout="ragged", budget="uniform")
    assert [block.units_before for block in prune(model, ready_batches(model), config).blocks] == [6, 3]


@pytest.mark.parametrize(
    "target", [{"keep": 0.6}, {"params": 50000}, {"macs": 0.75}, {"size": "205 KB"}, {"latency": 0.95}]
)
def test_any_target_is_met_with_query_heads(target, clock):
    model = without_heads("mistral", "query heads", hidden_size=48)
    report = prune(model, ready_batches(model), PruneConfig(**SETTINGS, **target, layout="ragged"))
    assert report.allocation.reached <= report.allocation.limit
    if "params" in target:
        assert report.allocation.reached == model.num_parameters()
    if "macs" in target:
        assert report.allocation.reached == pytest.approx(report.macs.after)


def test_what_whole_key_value_heads_leave_of_the_budget_is_used():
    model = tiny("qwen3", num_attention_heads=6, num_key_value_heads=2)  # 3 queries each
    report = prune(model, ready_batches(model), PruneConfig(**SETTINGS, keep=0.75))
    # One key/value head of two is half of the block, two queries of three in each group are three quarters.
    assert [(block.units_before, block.units_after) for block in report.blocks] == [(6, 4)] * 2


@pytest.mark.parametrize("budget", ["global", "equal_loss"])
@pytest.mark.parametrize("layout", ["ragged", "stock"])
def test_budgets_share_out_query_heads_where_no_key_value_head_can_go(layout, budget):
    model = tiny("qwen3", num_attention_heads=8, num_key_value_heads=2)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data.view(48, 2, 4, 8)[:, :, 1] = 0
    config = PruneConfig(**SETTINGS, keep=0.8, layout=layout, budget=budget)
    report = prune(model, ready_batches(model), config)
    # Three queries of four, with all keys and values, are four fifths; one key/value head of two is half.
    assert [block.kept_units for block in report.blocks] == [(0, 2, 3, 4, 6, 7)] * 2
    assert report.allocation.reached == pytest.approx(report.allocation.limit)
    assert report.drift["relative_error"] < 1e-3
    assert report.allocation.predicted_drift < 1e-6


def test_query_heads_whose_number_no_config_can_say_are_passed_over():
    model = tiny("llama", hidden_size=64, num_attention_heads=8, num_key_value_heads=2)
    config = PruneConfig(**SETTINGS, keep=0.8, layout="stock")
    report = prune(model, ready_batches(model), config)
    assert report.layout == "stock"
    assert report.allocation.reached <= report.allocation.limit
    # Six heads do not divide the hidden size.
    assert {block.units_after for block in report.blocks if block.units_before == 8} <= {2, 4}


@pytest.mark.slow
def test_query_heads_load_without_hf_subprune(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    for family in ("llama", "qwen3"):
        model = without_heads(family, "query heads")
        batch = ready_batches(model)[0]
        prune(model, ready_batches(model), PruneConfig(**SETTINGS, keep=0.67, layout="ragged"))
        model.save_pretrained(tmp_path / family)
        write_remote_code(tmp_path / family, model)
        torch.save((batch, call(model, batch).logits, model.state_dict()), tmp_path / f"{family}.pt")
    script = """
        import json, sys
        sys.modules["hf_subprune"] = None
        import torch, transformers
        found = {}
        for family in ("llama", "qwen3"):
            auto = transformers.AutoModelForCausalLM
            model = auto.from_pretrained(f"{sys.argv[1]}/{family}", trust_remote_code=True)
            batch, expected, weights = torch.load(f"{sys.argv[1]}/{family}.pt")
            state = model.state_dict()
            same = state.keys() == weights.keys() and all(torch.equal(state[name], weights[name]) for name in weights)
            with torch.no_grad():
                found[family] = same and torch.allclose(model.eval()(**batch).logits, expected, atol=1e-5)
        print(json.dumps(found))
        """
    assert run_fresh(script, tmp_path)[0] == {"llama": True, "qwen3": True}
