"""Experts that are modules of their own in a list."""

import re
from collections import Counter

import pytest
import torch
from torch import nn
from transformers import NllbMoeConfig, NllbMoeForConditionalGeneration, PreTrainedConfig, PreTrainedModel

from hf_subprune import PruneConfig, prune, prune_checkpoint
from hf_subprune.collection.observers import common
from hf_subprune.coverage.tiny import tiny_model
from hf_subprune.data.padding import token_mask
from hf_subprune.discovery.discover import discover
from hf_subprune.discovery.probe_inputs import probe_inputs
from hf_subprune.models.experts import routed_tokens
from hf_subprune.models.forms import all_running, apart
from hf_subprune.models.running import around
from hf_subprune.training.gradual import GradualPruning

QUICK = {"samples": 16, "held_out": 8, "batch_size": 4}


def switch():
    torch.manual_seed(0)
    return tiny_model("switch_transformers", "main").eval()


def nllb():
    torch.manual_seed(0)
    config = NllbMoeConfig(
        vocab_size=60, d_model=32, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=48, decoder_ffn_dim=48,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_sparse_step=1, decoder_sparse_step=1,
        num_experts=4, expert_capacity=64, max_position_embeddings=64,
    )  # fmt: skip
    return NllbMoeForConditionalGeneration(config).eval()


def unlike():
    """Routers of an NLLB model and of one with half of its neurons disagree."""
    model = nllb()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("fc2.weight"):
                parameter.normal_(0, 0.5)
            elif "classifier" in name:
                parameter.normal_()
            elif "embed_positions" in name or "shared" in name:
                parameter.normal_(0, 0.2)
    return model


def batches(count=6):
    random = torch.Generator().manual_seed(0)
    mask = torch.ones(4, 12, dtype=torch.long)
    mask[1, 7:] = 0
    return [
        {
            "input_ids": torch.randint(3, 50, (4, 12), generator=random),
            "attention_mask": mask,
            "decoder_input_ids": torch.randint(3, 50, (4, 9), generator=random),
        }
        for _ in range(count)
    ]


def lists(model):
    return [name for name, module in model.named_modules() if name.endswith(".experts")]


@pytest.mark.parametrize("make", [switch, nllb])
def test_every_expert_is_found_even_if_no_token_is_sent_to_it(make):
    model = make()
    inputs = {name: values[:1, :1] for name, values in probe_inputs(model).items()}
    with torch.no_grad():
        before = model(**inputs)[0]
    found = {block.name for block in discover(model, inputs).blocks if ".experts." in block.name}
    assert found == {f"{name}.expert_{i}" for name in lists(model) for i in range(4)}
    assert not any("forward" in module.__dict__ for module in model.modules())
    with torch.no_grad(), apart(model.modules()):
        assert torch.equal(model(**inputs)[0], before)
        with all_running(model.modules()):
            assert torch.equal(model(**inputs)[0], before)


@pytest.mark.parametrize("make", [switch, nllb])
def test_it_is_known_which_tokens_reach_an_expert_and_which_of_them_are_padding(make):
    model, batch = make(), batches(1)[0]
    path = next(name for name in lists(model) if "encoder" in name)
    experts = model.get_submodule(path)
    seen = {}
    handles = [experts.register_forward_pre_hook(lambda _, args: seen.update(hidden=args[0]))]
    for name in experts._modules:
        if name.startswith("expert_"):
            handles.append(experts[name].register_forward_pre_hook(lambda _, a, name=name: seen.update({name: a[0]})))
    with apart(model.modules()), torch.no_grad():
        model(**batch)
        assert len(seen) == 5
        for name in set(seen) - {"hidden"}:
            consumer = f"{path}.{name}.wo"
            where, tokens, of = routed_tokens(around(model, consumer), consumer)
            assert where == path and of == 48
            assert torch.equal(seen["hidden"][tokens], seen[name])
            mask = token_mask(model, consumer, batch, seen[name].shape)
            assert torch.equal(mask, batch["attention_mask"].flatten()[tokens].bool())
    assert sum(len(seen[name]) for name in set(seen) - {"hidden"}) >= 43
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("variant", ["layer", "residual"])
def test_they_are_pruned_though_the_routers_of_both_models_disagree(variant):
    model = switch()
    report = prune(model, batches(), PruneConfig(**QUICK, keep=0.6, variant=variant, budget="uniform"))
    experts = [block for block in report.blocks if ".experts." in block.name]
    assert len(experts) == 16
    assert all(0 < block.units_after < 96 and block.fitted_error < 1 for block in experts)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_tokens_of_two_models_are_paired_in_any_order_and_as_often_as_both_have_them():
    random = torch.Generator().manual_seed(0)
    for _ in range(20):
        first, second = (torch.randint(0, 12, (n,), generator=random) for n in torch.randint(0, 30, (2,)).tolist())
        here, there = common(first, second)
        assert torch.equal(first[here], second[there])
        both = Counter(first.tolist()) & Counter(second.tolist())
        assert len(here.unique()) == len(there.unique()) == both.total()


def test_rows_are_paired_by_token_though_experts_get_them_out_of_order_and_twice():
    report = prune(unlike(), batches(), PruneConfig(**QUICK, keep=0.5, variant="asym", budget="uniform"))
    errors = {block.name: block.fitted_error for block in report.blocks}
    # more than 0.5 if rows of different tokens are paired
    assert errors["model.encoder.layers.1.ffn.experts.expert_0"] < 0.2
    assert errors["model.decoder.layers.1.ffn.experts.expert_1"] < 0.2


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x, mask=None):
        return x + self.second(torch.relu(self.first(x)))


class Stack(nn.ModuleList):
    """Layers that read one another."""

    def forward(self, hidden, attention_mask, position_bias):
        for layer in self:
            hidden = layer(hidden, attention_mask)
        return hidden


class ByKeyword(nn.ModuleList):
    """Experts that a note of what they are given cannot stand in for."""

    def forward(self, hidden, index, weights):
        output = torch.zeros_like(hidden)
        for number, expert in enumerate(self):
            at = (index == number).nonzero().flatten()
            output.index_add_(0, at, expert(x=hidden[at].to(expert.first.weight.dtype)) * weights[at])
        return output


@pytest.mark.parametrize(("kind", "flat"), [(Stack, False), (Stack, True), (ByKeyword, True)])
def test_lists_that_select_no_tokens_run_as_they_are(kind, flat):
    torch.manual_seed(0)
    model = nn.ModuleDict({"layers": kind(Layer() for _ in range(3)), "out": nn.Linear(8, 4)})

    def forward(x):
        hidden = x.flatten(0, 1) if flat else x
        routing = {"weights": torch.ones(len(hidden), 1), "index": torch.arange(len(hidden)) % 3}
        if kind is Stack:
            routing = {"position_bias": None, "attention_mask": None}
        return model["out"](model["layers"](hidden, **routing))

    model.forward = forward
    x = torch.randn(2, 6, 8)
    before = model(x)
    with apart(model.modules()):
        assert torch.equal(model(x), before)
        assert routed_tokens(around(model, "layers.1.second"), "layers.1.second") is None
    assert [block.consumer for block in discover(model, {"x": x}).blocks] == [f"layers.{i}.second" for i in range(3)]
    assert not any("forward" in module.__dict__ for module in model["layers"].modules())


class Selecting(nn.ModuleList):
    def forward(self, hidden, index, weights):
        output = torch.zeros_like(hidden)
        for number in index.unique().tolist():
            output[index == number] = self[number](hidden[index == number])
        return output * weights


def test_an_expert_that_overflows_on_tokens_of_others_changes_nothing():
    torch.manual_seed(0)
    model = nn.Sequential(Selecting(Layer() for _ in range(2)))
    nn.init.constant_(model[0][1].second.weight, float("inf"))
    arguments = torch.randn(4, 8), torch.zeros(4, dtype=torch.long), torch.ones(4, 1)
    before = model[0](*arguments)
    with apart(model.modules()), all_running(model.modules()):
        assert torch.equal(model[0](*arguments), before)
        assert len(routed_tokens(around(model, "0.1.second"), "0.1.second")[1]) == 4


@pytest.mark.slow
def test_a_checkpoint_read_layer_by_layer_gives_the_same(tmp_path):
    model = switch()
    model.save_pretrained(tmp_path / "original")
    config = PruneConfig(samples=8, held_out=4, batch_size=4, keep=0.6, layout="ragged")
    prune_checkpoint(str(tmp_path / "original"), batches(), config, out=str(tmp_path / "pruned"))
    prune(model, batches(), config)
    pruned = type(model).from_pretrained(tmp_path / "pruned").state_dict()
    assert all(torch.equal(pruned[name], value) for name, value in model.state_dict().items())


class Mixture(nn.Module):
    """Routes by itself, to the expert of the largest of a linear's outputs."""

    def __init__(self, experts):
        super().__init__()
        self.router = nn.Linear(6, experts)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 6)) for _ in range(experts)
        )

    def always(self, expert):
        nn.init.zeros_(self.router.bias).data[expert] = 100.0
        return self

    def forward(self, x):
        rows = x.flatten(0, 1)
        chosen = self.router(rows).argmax(1)
        output = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            if (chosen == number).any():
                output[chosen == number] = expert(rows[chosen == number])
        return x + output.view_as(x)


def test_experts_that_the_forward_does_not_reach_are_refused():
    torch.manual_seed(0)
    model = nn.ModuleDict({"layers": nn.ModuleList(Mixture(2).always(1) for _ in range(2))})
    model.forward = lambda x: model["layers"][1](model["layers"][0](x))
    discovery = discover(model, {"x": torch.randn(2, 5, 6)})
    assert [block.consumer for block in discovery.blocks] == ["layers.0.experts.1.2", "layers.1.experts.1.2"]
    silent = [one for one in discovery.refusals if "does not reach it" in one.reason]
    assert [one.name for one in silent] == ["layers.0.experts.0", "layers.1.experts.0"]
    assert all(one.kind == "mlp" for one in silent)


class Routed(PreTrainedModel):
    config_class = PreTrainedConfig

    def __init__(self, config):
        super().__init__(config)
        self.embedding = nn.Embedding(50, 6)
        self.layers = nn.ModuleList(Mixture(3) for _ in range(2))

    def forward(self, input_ids):
        hidden = self.embedding(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return (hidden,)


def test_experts_that_training_leaves_without_tokens_keep_the_units_that_they_have(caplog):
    torch.manual_seed(0)
    model = Routed(PreTrainedConfig()).eval()
    data = [{"input_ids": torch.randint(0, 50, (4, 12))} for _ in range(8)]
    config = PruneConfig(**QUICK, keep=0.5, units=("mlp",), variant="layer", budget="uniform")
    gradual = GradualPruning(model, data, config)
    gradual.step(0.4)
    before = {name: len(kept) for name, kept in gradual.kept.items()}
    assert set(before.values()) == {8}
    for layer in model.layers:
        layer.always(1)
    gradual.step(0.8)
    assert re.search(r"no longer reaches [^:]*'layers\.0\.experts\.2\.mlp', 'layers\.1\.experts\.0\.mlp'", caplog.text)
    widths = {block.name: block.units_after for block in gradual.finish().blocks}
    assert widths == {name: 5 if ".experts.1." in name else 8 for name in before}


def test_every_expert_is_a_block_or_refused_whatever_a_trace_reaches():
    for seed in range(12):
        torch.manual_seed(seed)
        model = Routed(PreTrainedConfig()).eval()
        discovery = discover(model, {"input_ids": torch.randint(0, 50, (1, 2))})
        found = {block.name.removesuffix(".mlp") for block in discovery.blocks}
        refused = {refusal.name for refusal in discovery.refusals}
        assert found | refused == {f"layers.{i}.experts.{j}" for i in range(2) for j in range(3)}
