"""Experts stacked in one tensor: taken apart, pruned, stacked again, stored."""

import copy
from dataclasses import replace

import pytest
import torch
from same import assert_same_weights
from torch import nn

from hf_subprune import PruneConfig, prune
from hf_subprune.blocks import groups_of
from hf_subprune.collection.block_moments import BlockMoments
from hf_subprune.coverage.tiny import tiny_model
from hf_subprune.data.padding import token_mask
from hf_subprune.discovery.discover import discover
from hf_subprune.discovery.probe_inputs import probe_inputs
from hf_subprune.evaluation.costs import count_macs
from hf_subprune.models.experts import Expert
from hf_subprune.models.forms import all_running, apart, put_together, take_apart, together
from hf_subprune.pruning import prune_sizes
from hf_subprune.report.tables import block_table
from hf_subprune.solver.moments import MomentAccumulator
from hf_subprune.solver.problem import Problem
from hf_subprune.solver.settings import Settings
from hf_subprune.solver.solve import solve
from hf_subprune.surgery.edits import shrink
from hf_subprune.surgery.verification import EquivalenceError, verify
from hf_subprune.training.gradual import GradualPruning

# Plain, transposed, interleaved with biases, without a gate, with a norm behind, tokens in turn, shared experts.
FAMILIES = [
    "mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "deepseek_v3", "olmoe", "granitemoe", "llama4_text", "aria_text",
    "nemotron_h", "muse_spark_text", "phimoe",
]  # fmt: skip
QUICK = {"samples": 16, "held_out": 8, "batch_size": 4}


def stacked_blocks(model):
    return [block for block in discover(model).blocks if block.stack is not None]


def batches(model, count=6, rows=4, length=12):
    random = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    return [
        {
            "input_ids": torch.randint(3, vocabulary, (rows, length), generator=random),
            "attention_mask": torch.ones(rows, length, dtype=torch.long),
        }
        for _ in range(count)
    ]


def first_output(model, batch):
    with torch.no_grad():
        return model.eval()(**batch)[0]


def distance(one, other):
    return float((one - other).abs().max() / other.abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_expert_is_found_and_the_model_stays_as_it_was(family):
    model = tiny_model(family)
    before = {name: (parameter, parameter.detach().clone()) for name, parameter in model.named_parameters()}
    modules = [name for name, _ in model.named_modules()]
    groups = [group.blocks for group in groups_of(stacked_blocks(model)) if group.share == "width"]
    assert groups
    for group in groups:
        experts = model.get_submodule(group[0].stack)
        assert [block.name for block in group] == [f"{group[0].stack}.{i}" for i in range(len(experts.down_proj))]
        assert {block.kind for block in group} == {"mlp"}
        stacks = {name: tensor.numel() for name, tensor in experts.named_parameters(recurse=False)}
        stacks.pop("down_proj_bias", None)
        assert sum(block.parameters for block in group) == sum(stacks.values())
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    for name, (parameter, value) in before.items():
        assert after[name] is parameter and torch.equal(parameter, value)
    assert [name for name, _ in model.named_modules()] == modules
    assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_with_its_experts_apart_computes_the_same(family):
    model = tiny_model(family)
    inputs = probe_inputs(model)
    expected = first_output(model, inputs)
    with apart(model.modules()):
        assert any(isinstance(module, Expert) for module in model.modules())
        assert distance(first_output(model, inputs), expected) < 1e-5
        with all_running(model.modules()):
            assert distance(first_output(model, inputs), expected) < 1e-5
        with apart(model.modules()):
            pass
        assert any(isinstance(module, Expert) for module in model.modules())
        with together(model.modules()):
            assert torch.equal(first_output(model, inputs), expected)
        assert any(isinstance(module, Expert) for module in model.modules())
    assert torch.equal(first_output(model, inputs), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_other_units_of_each_expert_can_go(family):
    model = tiny_model(family)
    inputs = probe_inputs(model)
    zeroed = copy.deepcopy(model)
    with apart(model.modules()):
        blocks = stacked_blocks(model)
        kept = {}
        for number, block in enumerate(blocks):
            random = torch.Generator().manual_seed(number)
            kept[block.name] = torch.randperm(block.units, generator=random)[:40].sort().values
        assert len({tuple(some.tolist()) for some in kept.values()}) == len(blocks)
        for block in blocks:
            shrink(model, block, kept[block.name])
    for block in blocks:
        removed = torch.ones(block.units, dtype=torch.bool)
        removed[kept[block.name]] = False
        stack = zeroed.get_submodule(block.stack).down_proj.data[int(block.name.rpartition(".")[2])]
        # Along the dimension that is as long as there are units; sizes of the tiny models differ.
        stack.index_fill_([*stack.shape].index(block.units), removed.nonzero().flatten(), 0.0)
    assert distance(first_output(model, inputs), first_output(zeroed, inputs)) < 1e-5
    stacks = {block.stack for block in blocks}
    assert all(40 in model.get_submodule(stack).down_proj.shape for stack in stacks)


@pytest.mark.parametrize(
    "family", ["mixtral", "qwen2_moe", "deepseek_v3", "olmoe", "granitemoe", "gpt_oss", "qwen3_moe"]
)
def test_equal_widths_load_with_the_stock_config(family, tmp_path):
    model = tiny_model(family, "main")
    report = prune(model, batches(model), PruneConfig(**QUICK, units=["mlp"], layout="stock", budget="uniform"))
    assert report.layout == "stock" and {block.units_after for block in report.blocks} == {48}
    assert not hasattr(model.config, "subprune")
    assert_reloads(model, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["layer", "seq", "asym"])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "llama4_text", "deepseek_v3"])
def test_widths_of_their_own_load_too(family, variant, tmp_path):
    model = tiny_model(family, "main")
    report = prune(model, batches(model), PruneConfig(**QUICK, keep=0.6, variant=variant, layout="ragged"))
    assert report.layout == "ragged"
    widths = {}
    for block in report.blocks:
        if ".experts." in block.name:
            widths.setdefault(block.name.rpartition(".")[0], []).append(block.units_after)
    assert widths and all(len(set(equal)) == 1 and equal[0] % 8 == 0 for equal in widths.values())
    kept = {block.kept_units for block in report.blocks if ".experts." in block.name and block.units_after < 96}
    assert len(kept) > 1
    assert_reloads(model, tmp_path)


def assert_reloads(model, folder):
    model.save_pretrained(folder)
    reloaded = type(model).from_pretrained(folder).eval()
    assert_same_weights(reloaded, model)
    batch = batches(model)[0]
    torch.testing.assert_close(first_output(reloaded, batch), first_output(model, batch))


@pytest.mark.slow
def test_reweighting_beats_removal_on_held_out_rows():
    errors = {}
    for reweight in (True, False):
        model = tiny_model("mixtral", "main")
        config = PruneConfig(units=["mlp"], samples=96, held_out=32, batch_size=16, variant="layer", reweight=reweight)
        report = prune(model, batches(model, count=8, rows=16, length=24), config)
        errors[reweight] = sum(block.held_out_error for block in report.blocks)
    assert errors[True] < 0.9 * errors[False]


def moments_of(rows, W, folds=2):
    """Moments of an expert that few tokens reach, as the calibration sums them."""
    accumulators = [MomentAccumulator(len(W), intercept=False) for _ in range(folds + 1)]
    for number, row in enumerate(rows):
        accumulators[number % folds].update(row[None])
    return BlockMoments(tuple(accumulators[:folds]), accumulators[folds])


def test_an_expert_without_tokens_keeps_its_weights():
    W = torch.randn(12, 6, generator=torch.Generator().manual_seed(0))
    moments = moments_of([], W)
    solution = solve(Problem(moments.of_folds(W), W), 5, Settings())
    assert sorted(W.norm(dim=1).topk(5).indices.tolist()) == solution.kept_units.tolist()
    assert torch.allclose(solution.V, W.double()[solution.kept_units], atol=1e-6)


def test_the_fewer_the_tokens_the_closer_an_expert_stays_to_its_weights():
    random = torch.Generator().manual_seed(0)
    W = torch.randn(24, 16, generator=random)
    mixing = torch.randn(8, 24, generator=random)

    def inputs(count):
        return torch.randn(count, 8, generator=random) @ mixing + 0.1 * torch.randn(count, 24, generator=random)

    fresh = inputs(2000)
    moved, errors = {}, {}
    for count in (1, 2, 6, 400):
        moments = moments_of(inputs(count), W)
        solution = solve(Problem(moments.of_folds(W), W), 12, Settings())
        kept, V = solution.kept_units, solution.V.float()
        moved[count] = float((V - W[kept]).norm())
        removed = float((fresh @ W - fresh[:, kept] @ W[kept]).norm())
        errors[count] = float((fresh @ W - fresh[:, kept] @ V).norm()) / removed
    assert moved[1] < 0.5 * moved[400] and moved[2] < 0.5 * moved[400]
    assert errors[1] < 1.1 and errors[2] < 1.1 and errors[6] < 1.1
    assert errors[400] < 0.5


@pytest.mark.slow
def test_experts_that_no_token_reaches_keep_a_part_of_their_weights():
    model = tiny_model("mixtral", "main")
    # One token over and over: each layer sends it to two of its four experts.
    same = [{"input_ids": torch.full((4, 6), 7)} for _ in range(4)]
    with apart(model.modules()):
        calls = {}
        for name, module in model.named_modules():
            if isinstance(module, Expert):
                module.second.register_forward_pre_hook(
                    lambda _, args, name=name: calls.update({name: calls.get(name, 0) + len(args[0])})
                )
        model(**same[0])
        before = {name: copy.deepcopy(module) for name, module in model.named_modules() if isinstance(module, Expert)}
    silent = [name for name, rows in calls.items() if rows == 0]
    assert 0 < len(silent) < len(calls)
    model = tiny_model("mixtral", "main")
    report = prune(model, same, PruneConfig(units=["mlp"], samples=12, held_out=4, batch_size=4, layout="ragged"))
    for block in report.blocks:
        if block.name in silent:
            stack, _, number = block.name.rpartition(".")
            new = model.get_submodule(stack).down_proj[int(number)]
            old = before[block.name].second.weight[:, torch.tensor(block.kept_units)]
            assert torch.allclose(new, old, atol=1e-6)


def test_padding_reaches_no_experts_moments():
    model = tiny_model("mixtral", "main")
    batch = batches(model, count=1)[0]
    batch["attention_mask"][1, 5:] = 0
    real = int(batch["attention_mask"].sum())
    with apart(model.modules()):
        counts = []
        for block in stacked_blocks(model)[:4]:
            consumer = model.get_submodule(block.consumer)

            def count(_, args, block=block):
                mask = token_mask(model, block.consumer, batch, args[0].shape)
                counts.append(len(args[0]) if mask is None else int(mask.sum()))

            consumer.register_forward_pre_hook(count)
        model(**batch)
    assert sum(counts) == 2 * real  # two experts a token


def test_the_moments_of_an_expert_weigh_tokens_as_the_router_does():
    model = tiny_model("mixtral")
    inputs = probe_inputs(model)
    layer = model.layers[0].mlp
    seen = {}
    handle = layer.experts.register_forward_pre_hook(lambda _, args: seen.update(args=args))
    model(**inputs)
    handle.remove()
    hidden, index, weights = seen["args"]
    with apart(model.modules()):
        rows = {}
        for number in range(4):
            expert = layer.experts.get_submodule(str(number))
            expert.second.register_forward_pre_hook(lambda _, args, number=number: rows.update({number: args[0]}))
        model(**inputs)
    for number in range(4):
        sent = (index == number).any(-1)
        gate, up = nn.functional.linear(hidden[sent], layer.experts.gate_up_proj[number]).chunk(2, -1)
        share = (weights * (index == number)).sum(-1)[sent, None]
        assert torch.allclose(rows[number], nn.functional.silu(gate) * up * share, atol=1e-5)


def test_what_is_not_understood_is_refused_by_name():
    discovery = discover(tiny_model("jetmoe"))
    refused = {refusal.name: refusal for refusal in discovery.refusals}
    reason = refused["layers.0.mlp.input_linear"].reason
    assert "JetMoeParallelExperts" in reason and "not understood" in reason


def test_experts_with_another_forward_are_left_whole():
    model = tiny_model("mixtral")
    experts = model.layers[0].mlp.experts
    experts.forward = experts.forward
    discovery = discover(model)
    assert {block.stack for block in discovery.blocks if block.stack} == {"layers.1.mlp.experts"}
    reasons = {refusal.name: refusal.reason for refusal in discovery.refusals}
    assert "was replaced" in reasons["layers.0.mlp.experts"]


def test_experts_that_compute_something_else_are_refused():
    model = tiny_model("mixtral")
    experts = model.layers[1].mlp.experts
    gate = type(experts)._apply_gate
    experts._apply_gate = lambda inner: gate(experts, inner) + 1
    experts.config = copy.deepcopy(experts.config)
    experts.config._experts_implementation = "eager"  # whose gate is not the one that was changed
    discovery = discover(model)
    assert {block.stack for block in discovery.blocks if block.stack} == {"layers.0.mlp.experts"}
    reasons = {refusal.name: refusal.reason for refusal in discovery.refusals}
    assert "not understood" in reasons["layers.1.mlp.experts"]


def test_experts_of_one_layer_cannot_be_chosen_in_part():
    model = tiny_model("mixtral", "main")
    with pytest.raises(ValueError, match="stored together and must all keep equally many units"):
        prune(model, batches(model), PruneConfig(**QUICK, exclude=["model.layers.0.mlp.experts.2"]))


def test_experts_of_different_widths_cannot_be_stacked():
    model = tiny_model("mixtral")
    modules = take_apart(model.modules())
    block = stacked_blocks(model)[1]
    edit = shrink(model, block, range(5))
    with pytest.raises(ValueError, match=r"equally many units, found \[96, 5, 96, 96\]"):
        put_together(modules)
    assert any(isinstance(module, Expert) for module in model.modules())
    edit.undo()
    put_together(modules)
    assert not any(isinstance(module, Expert) for module in model.modules())


def test_shrinking_an_expert_of_a_whole_model_says_what_to_do():
    model = tiny_model("mixtral")
    with pytest.raises(ValueError, match=r"inside of `models.forms.apart\(model"):
        shrink(model, stacked_blocks(model)[0], [0, 1])


@pytest.mark.slow
def test_a_failure_leaves_the_model_as_it_was(monkeypatch):
    model = tiny_model("mixtral", "main")
    before = {name: (parameter, parameter.detach().clone()) for name, parameter in model.named_parameters()}

    def fail(*_args, **_kwargs):
        raise EquivalenceError(stacked_blocks(model)[0], "made up")

    for stage in ("verify", "choose_layout", "drift"):
        with monkeypatch.context() as patch:
            patch.setattr(f"hf_subprune.solving.outcome.{stage}", fail)
            with pytest.raises(EquivalenceError):
                prune(model, batches(model), PruneConfig(**QUICK))
        after = dict(model.named_parameters())
        assert list(after) == list(before)
        assert all(after[name] is kept and torch.equal(kept, value) for name, (kept, value) in before.items())
        assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.slow
def test_several_sizes_from_one_calibration():
    model = tiny_model("qwen2_moe", "main")
    batch = batches(model)[0]
    whole, before = first_output(model, batch), dict(model.named_parameters())
    configs = [PruneConfig(**QUICK, keep=keep, layout="ragged") for keep in (0.75, 0.5)]
    sizes = []
    for _ in prune_sizes(model, batches(model), configs):
        assert not any(isinstance(module, Expert) for module in model.modules())
        sizes.append(model.num_parameters())
    assert sizes[1] < sizes[0] < sum(parameter.numel() for parameter in before.values())
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert torch.equal(first_output(model, batch), whole)


@pytest.mark.slow
def test_gradual_pruning_masks_the_stacked_tensors():
    model = tiny_model("mixtral", "main")
    parameters = dict(model.named_parameters())
    gradual = GradualPruning(model, batches(model), PruneConfig(**QUICK, units=["mlp"]))
    assert gradual.step(0.5)
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    down = model.model.layers[0].mlp.experts.down_proj
    masked = (down == 0).all(1).sum(1)
    assert masked.tolist() == [24] * 4
    with torch.no_grad():
        down += 1.0
    gradual.mask()
    assert torch.equal((down == 0).all(1).sum(1), masked)
    before = first_output(model, batches(model)[0])
    report = gradual.finish()
    assert {block.units_after for block in report.blocks} == {48}
    assert model.model.layers[0].mlp.experts.down_proj.shape == (4, 64, 48)
    assert before.shape == first_output(model, batches(model)[0]).shape


def test_products_of_experts_are_counted():
    model = tiny_model("mixtral")
    batch = probe_inputs(model)
    tokens = batch["input_ids"].shape[1]
    config = model.config
    inside = 2 * config.num_experts_per_tok * tokens * 3 * config.hidden_size * config.intermediate_size
    without = copy.deepcopy(model)
    for layer in without.layers:
        layer.mlp.experts.forward = lambda hidden, *_: hidden
    assert count_macs(model, batch) - count_macs(without, batch) == inside


def test_verification_looks_at_every_expert():
    model = tiny_model("mixtral")
    with apart(model.modules()):
        blocks = stacked_blocks(model)
        for block in blocks:
            producers = [replace(piece, index=piece.index.roll(1, 0)) for piece in block.slices[1:]]
            wrong = replace(block, slices=(block.slices[0], *producers))
            with pytest.raises(EquivalenceError):
                verify(model, [wrong], {block.name: torch.arange(1, 40)}, probe_inputs(model))


def test_weights_and_biases_of_an_expert_are_parts_of_the_stacks():
    model = tiny_model("gpt_oss")
    with apart(model.modules()):
        expert = model.layers[1].mlp.experts.get_submodule("2")
        expert.second.weight.data.zero_()
        expert.second.bias.data.fill_(3.0)
    experts = model.layers[1].mlp.experts
    assert [bool(weight.any()) for weight in experts.down_proj] == [True, True, False, True]
    assert [bool((bias == 3).all()) for bias in experts.down_proj_bias] == [False, False, True, False]


def test_experts_of_a_layer_share_a_row_of_the_report():
    model = tiny_model("mixtral", "main")
    report = prune(model, batches(model), PruneConfig(**QUICK, units=["mlp"]))
    assert len(report.blocks) == 8
    table = block_table(report)
    assert list(table.columns[0].cells) == ["model.layers.0.mlp.experts.*", "model.layers.1.mlp.experts.*"]
    means = [sum(block.held_out_error for block in report.blocks[i : i + 4]) / 4 for i in (0, 4)]
    assert list(table.columns[3].cells) == [f"{mean:.4f}" for mean in means]
    assert "Experts of a layer" in table.caption and "Kept whole" not in table.caption
