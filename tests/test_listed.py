"""Experts that are modules of their own in a list."""

import pytest
import torch
from torch import nn
from transformers import NllbMoeConfig, NllbMoeForConditionalGeneration

from hf_subprune import PruneConfig, prune, prune_checkpoint
from hf_subprune.coverage.tiny import tiny_model
from hf_subprune.experts import all_running, routed_tokens
from hf_subprune.padding import token_mask
from hf_subprune.probe import discover, probe_inputs
from hf_subprune.stacked import apart

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
    with torch.no_grad(), apart(model):
        assert torch.equal(model(**inputs)[0], before)
        with all_running(model):
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
    with apart(model), torch.no_grad():
        model(**batch)
        assert len(seen) == 5
        for name in set(seen) - {"hidden"}:
            consumer = f"{path}.{name}.wo"
            around, tokens, of = routed_tokens(model, consumer)
            assert around == path and of == 48
            assert torch.equal(seen["hidden"][tokens], seen[name])
            mask = token_mask(model, consumer, batch, seen[name].shape)
            assert torch.equal(mask, batch["attention_mask"].flatten()[tokens].bool())
    assert sum(len(seen[name]) for name in set(seen) - {"hidden"}) >= 43
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("variant", ["layer", "residual"])
def test_they_are_pruned_though_the_routers_of_both_models_disagree(variant):
    model = switch()
    report = prune(model, batches(), PruneConfig(**QUICK, keep=0.6, variant=variant))
    experts = [block for block in report.blocks if ".experts." in block.name]
    assert len(experts) == 16
    assert all(0 < block.units_after < 96 and block.fitted_error < 1 for block in experts)
    assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.slow
def test_a_checkpoint_read_layer_by_layer_gives_the_same(tmp_path):
    model = switch()
    model.save_pretrained(tmp_path / "original")
    config = PruneConfig(**QUICK, keep=0.6, layout="ragged")
    prune_checkpoint(str(tmp_path / "original"), batches(), config, out=str(tmp_path / "pruned"))
    prune(model, batches(), config)
    pruned = type(model).from_pretrained(tmp_path / "pruned").state_dict()
    assert all(torch.equal(pruned[name], value) for name, value in model.state_dict().items())


class Mixture(nn.Module):
    """Routes by itself, to the expert that the sign of a linear's output chooses."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(6, 1)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 6)) for _ in range(2))
        nn.init.constant_(self.router.bias, 100.0)

    def forward(self, x):
        rows = x.flatten(0, 1)
        chosen = (self.router(rows)[:, 0] > 0).long()
        output = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            if (chosen == number).any():
                output[chosen == number] = expert(rows[chosen == number])
        return x + output.view_as(x)


def test_experts_that_the_forward_does_not_reach_are_refused():
    torch.manual_seed(0)
    model = nn.ModuleDict({"layers": nn.ModuleList(Mixture() for _ in range(2))})
    model.forward = lambda x: model["layers"][1](model["layers"][0](x))
    discovery = discover(model, {"x": torch.randn(2, 5, 6)})
    assert [block.consumer for block in discovery.blocks] == ["layers.0.experts.1.2", "layers.1.experts.1.2"]
    silent = [one for one in discovery.refusals if "does not reach it" in one.reason]
    assert [one.name for one in silent] == ["layers.0.experts.0", "layers.1.experts.0"]
    assert all(one.kind == "mlp" for one in silent)
