"""Whole experts: which go, what the others make up for, and that the router never misses them."""

import copy
from dataclasses import replace

import pytest
import torch
from same import assert_same_weights

from hf_subprune import PruneConfig, PruneReport, prune
from hf_subprune.coverage.tiny import tiny_model
from hf_subprune.data.reading import read
from hf_subprune.discovery.probe_inputs import probe_inputs
from hf_subprune.pruning import prune_sizes
from hf_subprune.routing.choice import _fitted, choose_experts, fit_experts
from hf_subprune.routing.layers import exact_layers, routed_layers, unrouted, verify_routed
from hf_subprune.routing.tokens import tokens_of
from hf_subprune.surgery.edits import assign, shrink
from hf_subprune.surgery.verification import EquivalenceError
from hf_subprune.training.gradual import GradualPruning

# Softmax and sigmoid scores, biases of the logits and of the choice, shared experts.
FAMILIES = [
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "gpt_oss",
    "glm4_moe",
    "olmoe",
    "granitemoe",
    "ernie4_5_moe",
    "phimoe",
]
CONFIG = PruneConfig(samples=48, held_out=16, batch_size=8, keep=0.5, units=("experts",))


def batches(model, count=8, rows=8, length=16):
    random = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[1, 9:] = 0
    ids = [torch.randint(3, vocabulary, (rows, length), generator=random) for _ in range(count)]
    return [{"input_ids": one, "attention_mask": mask} for one in ids]


def first_tokens(model, config=CONFIG):
    layers, _ = routed_layers(model, probe_inputs(model))
    return next(tokens_of(layers, read(model, batches(model), config)))


def routed_output(model, batch):
    """Of the first layer's experts at real tokens, `(tokens, d)`."""
    seen = []
    name = routed_layers(model, probe_inputs(model))[0][0].block.name
    handle = model.get_submodule(name).register_forward_hook(lambda _, __, output: seen.append(output))
    with torch.no_grad():
        model(**batch)
    handle.remove()
    return seen[0][batch["attention_mask"].flatten().bool()]


@pytest.mark.parametrize("family", FAMILIES)
def test_removing_experts_equals_never_choosing_them(family):
    model = tiny_model(family)
    inputs = probe_inputs(model)
    before = copy.deepcopy(model.state_dict())
    layers, refusals = routed_layers(model, inputs)
    exact, inexact = exact_layers(model, layers, inputs)
    assert exact == layers and layers and not refusals and not inexact
    for kept in ([0, 1], [1, 3], [0, 2, 3]):
        verify_routed(model, layers, {one.block.name: torch.tensor(kept) for one in layers}, inputs)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks or "forward" in vars(module) for module in model.modules())


def test_a_router_that_keeps_the_wrong_rows_is_caught():
    model = tiny_model("mixtral")
    inputs = probe_inputs(model)
    (routed, _), _ = routed_layers(model, inputs)
    for piece in routed.block.slices:
        if piece.tensor.endswith("gate.weight"):
            object.__setattr__(piece, "index", piece.index.flip(0))
    with pytest.raises(EquivalenceError):
        verify_routed(model, [routed], {routed.block.name: torch.tensor([0, 1])}, inputs)


def test_layers_whose_routing_is_not_seen_are_refused():
    model = tiny_model("llama4_text")
    layers, refusals = routed_layers(model, probe_inputs(model))
    assert not layers and {one.kind for one in refusals} == {"experts"}
    with pytest.raises(ValueError, match="no layer of which whole experts can be removed"):
        prune(tiny_model("llama4_text", "main"), batches(model), CONFIG)


def test_experts_in_groups_are_refused():
    model = tiny_model("deepseek_v3")
    assert model.config.n_group > 1
    layers, _ = routed_layers(model, probe_inputs(model))
    exact, refusals = exact_layers(model, layers, probe_inputs(model))
    assert not exact and refusals[0].name == layers[0].block.name


def test_the_error_of_a_removal_is_that_of_the_layers_output():
    model = tiny_model("qwen2_moe")
    tokens = first_tokens(model)
    samples = tokens.samples
    whole = torch.cat([routed_output(model, batch) for batch in samples.fit])
    errors = {}
    for kept in ([0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]):
        with unrouted(model, tokens.routed, kept):
            left = torch.cat([routed_output(model, batch) for batch in samples.fit])
        errors[tuple(kept)] = float((whole - left).square().sum() / whole.square().sum())
        fit = fit_experts(tokens, torch.tensor(kept), reweight_kept=False)
        assert fit.fitted_error == pytest.approx(errors[tuple(kept)], rel=1e-3)
    single = {}
    for gone in range(4):
        left = torch.tensor([one for one in range(4) if one != gone])
        single[gone] = fit_experts(tokens, left, reweight_kept=False).fitted_error
    assert choose_experts(tokens, 3).tolist() == [one for one in range(4) if one != min(single, key=single.get)]
    chosen = choose_experts(tokens, 2)
    assert errors[tuple(chosen.tolist())] <= sorted(errors.values())[2]


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "glm4_moe"])
def test_experts_that_stay_make_up_for_those_that_go(family):
    model = tiny_model(family)
    tokens = first_tokens(model)
    kept = choose_experts(tokens, 2)
    alone = fit_experts(tokens, kept, reweight_kept=False)
    fitted = fit_experts(tokens, kept)
    assert not alone.parameters
    assert fitted.fitted_error < 0.95 * alone.fitted_error and fitted.held_out_error < 0.95 * alone.held_out_error
    held_out = tokens.samples.held_out
    whole = torch.cat([routed_output(model, batch) for batch in held_out])
    edits = [shrink(model, tokens.routed.block, kept), assign(model, "experts", fitted.parameters)]
    left = torch.cat([routed_output(model, batch) for batch in held_out])
    error = float((whole - left).square().sum() / whole.square().sum())
    assert error == pytest.approx(fitted.held_out_error, rel=1e-3)
    for edit in reversed(edits):
        edit.undo()
    assert torch.equal(torch.cat([routed_output(model, batch) for batch in held_out]), whole)


def test_experts_make_up_for_no_noise():
    random = torch.Generator().manual_seed(0)
    W = torch.randn(32, 8, generator=random)
    rows, unseen = torch.randn(2, 60, 32, generator=random)
    missing, noise = torch.randn(2, 60, 8, generator=random) * 3

    class Residual:
        fold = torch.arange(60) % 2

        def __init__(self):
            self.missing = missing

        def rows(self, expert):
            return torch.arange(60), rows

    V = _fitted(Residual(), 0, W, "auto")
    error = (unseen @ W + noise - unseen @ V).square().sum()
    assert error < 1.05 * noise.square().sum()


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "qwen2_moe"])
def test_the_config_says_how_many_experts_are_left(family, tmp_path):
    model = tiny_model(family, "main")
    report = prune(model, batches(model), CONFIG)
    assert report.layout == "stock"
    assert [(block.kind, block.units_before, block.units_after) for block in report.blocks] == [("experts", 4, 2)] * 2
    assert report.parameters.after == model.num_parameters() < report.parameters.before
    report.save(tmp_path)
    assert PruneReport.load(tmp_path).blocks == report.blocks
    assert "experts" in str(report)
    assert_reloads(model, tmp_path)


@pytest.mark.slow
def test_neurons_go_from_the_experts_that_stay(tmp_path):
    model = tiny_model("qwen2_moe", "main")
    keep = {"experts": 0.75, "mlp": 0.5}
    config = PruneConfig(samples=24, held_out=8, batch_size=8, keep=keep, units=("experts", "mlp"), layout="ragged")
    report = prune(model, batches(model), config)
    assert report.config["units"] == ["experts", "mlp"]
    assert [block.units_after for block in report.blocks if block.kind == "experts"] == [3, 3]
    inside = [block for block in report.blocks if block.stack is not None]
    assert len(inside) == 6 and all(block.units_after < 96 for block in inside)
    assert report.latency is not None and "latency_ratio" not in report.intervals  # that of the second step alone
    assert_reloads(model, tmp_path)


def assert_reloads(model, folder):
    model.save_pretrained(folder)
    reloaded = type(model).from_pretrained(folder).eval()
    assert_same_weights(reloaded, model)
    batch = batches(model)[0]
    with torch.no_grad():
        torch.testing.assert_close(reloaded(**batch)[0], model(**batch)[0])


def test_fewer_experts_than_a_token_is_sent_to_are_refused():
    model = tiny_model("mixtral", "main")
    before = copy.deepcopy(model.state_dict())
    config = PruneConfig(samples=24, held_out=8, keep=0.25, units=("experts",))
    message = r"keep=0\.25 would leave 1 of 4 experts in .*, whose router sends each token to 2: keep 0\.5 or more"
    with pytest.raises(ValueError, match=message):
        prune(model, batches(model), config)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    report = prune(model, batches(model), replace(config, keep=0.5))
    assert {block.units_after for block in report.blocks} == {model.config.num_experts_per_tok}


@pytest.mark.parametrize("keep", [{"params": 10**5}, {"keep": 0.5}])
def test_a_size_that_does_not_say_how_many_experts_is_refused(keep):
    model = tiny_model("mixtral", "main")
    with pytest.raises(ValueError, match="a fraction for them where other units go too"):
        prune(model, batches(model), PruneConfig(units=("mlp", "experts"), **keep))


def test_several_sizes_and_training_leave_experts_whole():
    model = tiny_model("mixtral", "main")
    with pytest.raises(ValueError, match="removed by `prune`, to one size"):
        next(prune_sizes(model, batches(model), [CONFIG]))
    with pytest.raises(ValueError, match="not in training"):
        GradualPruning(model, batches(model), CONFIG)


@pytest.mark.parametrize(
    "stage", ["routing.removal.verify_routed", "solving.outcome.choose_layout", "solving.outcome.drift"]
)
def test_a_failure_puts_the_experts_back(stage, monkeypatch):
    model = tiny_model("mixtral", "main")
    before = {name: (parameter, parameter.detach().clone()) for name, parameter in model.named_parameters()}
    config = copy.deepcopy(model.config.to_dict())

    def fail(*_args, **_kwargs):
        raise RuntimeError("made up")

    monkeypatch.setattr(f"hf_subprune.{stage}", fail)
    with pytest.raises(RuntimeError, match="made up"):
        prune(model, batches(model), CONFIG)
    after = dict(model.named_parameters())
    assert all(after[name] is kept and torch.equal(kept, value) for name, (kept, value) in before.items())
    assert model.model.layers[0].mlp.gate.num_experts == 4 and model.config.to_dict() == config


def test_a_model_that_returns_its_routers_logits_trains_on():
    model = tiny_model("mixtral", "main")
    model.config.output_router_logits = True
    prune(model, batches(model), CONFIG)
    assert model.num_experts == model.config.num_local_experts == 2
    batch = batches(model)[0]
    output = model(**batch, labels=batch["input_ids"])
    output.loss.backward()
    assert output.router_logits[0].shape[-1] == 2 and output.aux_loss.isfinite()
    assert model.model.layers[1].mlp.gate.weight.grad.any()
