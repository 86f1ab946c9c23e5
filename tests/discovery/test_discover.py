import pytest
import torch
from hand_made import Layers, Mlp, Normalized, X
from tiny import FAMILIES, tiny
from torch import nn

from hf_subprune.discovery import discover as discovering
from hf_subprune.discovery.discover import discover
from hf_subprune.discovery.probe_inputs import probe_inputs
from hf_subprune.discovery.ties import by_choice
from hf_subprune.models.running import floating_tensors
from hf_subprune.surgery.edits import shrink
from hf_subprune.surgery.masking import masked
from hf_subprune.surgery.verification import verify

# Families without heads that can be removed exactly, and those with channels.
KINDS = {
    "olmo2": {"mlp"},
    "resnet": {"channels"},
    "mobilenet_v2": {"channels"},
    "whisper": {"mlp", "attention", "channels"},
    "wav2vec2": {"mlp", "attention", "channels"},
}


def snapshot(model: nn.Module) -> dict:
    """All that discovery could disturb: values, identities, flags, attributes, hooks and the random state."""
    return {
        "parameters": {name: (id(p), p.requires_grad, p.grad, p.detach().clone()) for name, p in named(model)},
        "buffers": {name: (id(b), b.clone()) for name, b in model.named_buffers()},
        "modules": {
            name: (id(m), m.training, len(m._forward_hooks), len(m._forward_pre_hooks), plain(m))
            for name, m in model.named_modules()
        },
        "config": model.config.to_dict() if hasattr(model, "config") else None,
        "random": torch.get_rng_state(),
    }


def named(model: nn.Module):
    return model.named_parameters(remove_duplicate=False)


def plain(module: nn.Module) -> dict:
    return {k: v for k, v in module.__dict__.items() if isinstance(v, (int, float, str)) and k != "training"}


def assert_same(before, after) -> None:
    assert type(before) is type(after)
    if isinstance(before, torch.Tensor):
        assert torch.equal(before, after)
    elif isinstance(before, dict):
        assert before.keys() == after.keys()
        for key in before:
            assert_same(before[key], after[key])
    elif isinstance(before, tuple):
        assert len(before) == len(after)
        for one, other in zip(before, after, strict=True):
            assert_same(one, other)
    else:
        assert before == after


def halves(blocks, seed: int) -> dict[str, torch.Tensor]:
    """About half of each block's units: another number and choice in each, but within a tie."""
    kept = {}
    for i, group in enumerate(by_choice(blocks), seed):
        keep = max(1, group[0].units // 2 - i % 2)
        units = torch.randperm(group[0].units, generator=torch.Generator().manual_seed(i))[:keep].sort().values
        kept |= {block.name: units for block in group}
    return kept


@pytest.mark.parametrize("family", FAMILIES)
def test_every_block_of_a_family_shrinks_exactly_and_comes_back(family):
    model = tiny(family)
    inputs = probe_inputs(model)
    before = snapshot(model)
    discovery = discover(model)
    assert_same(before, snapshot(model))

    kinds = {block.kind for block in discovery.blocks}
    assert kinds == KINDS.get(family, {"mlp", "attention"})
    assert len({block.name for block in discovery.blocks}) == len(discovery.blocks)
    layers = {block.name.partition(".")[0] for block in discovery.blocks}
    assert layers, discovery.refusals

    kept = halves(discovery.blocks, 10)
    with torch.no_grad(), torch.random.fork_rng():  # some forwards draw random numbers even in evaluation mode
        original = list(floating_tensors(model(**inputs)))
        handles = [masked(model.get_submodule(block.consumer), block, kept[block.name]) for block in discovery.blocks]
        for handle in handles:
            handle.__enter__()
        expected = list(floating_tensors(model(**inputs)))
        for handle in handles:
            handle.__exit__(None, None, None)
        parameters = sum(p.numel() for p in model.parameters())
        edits = [shrink(model, block, kept[block.name]) for block in discovery.blocks]
        found = list(floating_tensors(model(**inputs)))
    freed = sum((b.units - len(kept[b.name])) * b.parameters_per_unit for b in discovery.blocks)
    left = sum(p.numel() for p in model.parameters())
    # A consumer that is another block's producer loses rows and columns, and what lies in both only once.
    chained = family in ("resnet", "mobilenet_v2")
    assert left <= parameters - freed if chained else left == parameters - freed
    assert len(found) == len(expected) > 0
    for one, other, whole in zip(found, expected, original, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))
        if whole.numel() > 1:
            assert not torch.allclose(one, whole)  # the masks did something
    for edit in reversed(edits):
        edit.undo()
    assert_same(before, snapshot(model))


@pytest.mark.parametrize("family", ["gpt2", "llama", "bart", "phi3"])
def test_a_pruned_model_can_be_pruned_again(family):
    model = tiny(family)
    inputs = probe_inputs(model)
    for _ in range(2):
        discovery = discover(model)
        assert {block.kind for block in discovery.blocks} == {"mlp", "attention"}
        kept = {block.name: torch.arange(block.units - 1 - i % 2) for i, block in enumerate(discovery.blocks)}
        verify(model, discovery.blocks, kept, inputs)
        for block in discovery.blocks:
            shrink(model, block, kept[block.name])


@pytest.mark.parametrize("family", ["gpt2", "llama", "phi3", "bart", "whisper", "gemma2", "falcon", "t5"])
def test_generation_with_a_cache_equals_generation_without(family):
    model = tiny(family)
    blocks = discover(model).blocks
    kept = halves(blocks, 0)
    for block in blocks:
        shrink(model, block, kept[block.name])
    inputs = probe_inputs(model)
    if "attention_mask" in inputs:
        inputs["attention_mask"][:] = 1
    prompt = {name: inputs[name] for name in ("input_ids", "attention_mask", "input_features") if name in inputs}
    arguments = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    cached = model.generate(**prompt, **arguments, use_cache=True)
    assert torch.equal(cached, model.generate(**prompt, **arguments, use_cache=False))


def test_block_names_and_order_follow_the_forward():
    names = [block.name for block in discover(tiny("bart")).blocks]
    assert names[:2] == ["model.encoder.layers.0.self_attn", "model.encoder.layers.0.mlp"]
    assert names[-3:] == [f"model.decoder.layers.1.{part}" for part in ("self_attn", "encoder_attn", "mlp")]
    names = [block.name for block in discover(tiny("bert")).blocks]
    assert names[:2] == ["bert.encoder.layer.0.attention", "bert.encoder.layer.0.mlp"]


class Centred(nn.Module):
    """Part of the columns mix, the others do not."""

    def forward(self, x):
        mixed, plain = x.relu().chunk(2, -1)
        return torch.cat([mixed - mixed.mean(-1, keepdim=True), plain], -1)


def test_a_plain_module_needs_no_config():
    blocks = discover(Layers(Mlp(), Mlp(16)), X).blocks
    assert [(block.name, block.units, block.parameters_per_unit) for block in blocks] == [
        ("layers.0.mlp", 20, 25),
        ("layers.1.mlp", 16, 25),
    ]


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        (Normalized(), "depends on all rows of 'layers.0.up'"),
        (nn.LayerNorm(20), "depends on all rows of 'layers.0.up'"),
        (Centred(), "differs from the masked original's"),
        (nn.Identity(), "low-rank pair"),
        (nn.Dropout(0.5), "low-rank pair"),
    ],
)
def test_a_layer_whose_removal_is_not_exact_is_refused(between, reason):
    model = Layers(Mlp(between=between), Mlp())
    discovery = discover(model, X)
    assert [block.name for block in discovery.blocks] == ["layers.1.mlp"]
    (refusal,) = discovery.refusals
    assert refusal.name.startswith("layers.0")
    assert reason in refusal.reason
    assert refusal.advice


def test_heads_behind_a_norm_over_all_heads_are_refused_by_name():
    refusals = [one for one in discover(tiny("olmo2")).refusals if one.kind == "attention"]
    assert [one.name for one in refusals] == [f"model.layers.{i}.self_attn" for i in range(2)]
    assert "k_proj" in refusals[0].reason and "q_proj" in refusals[0].reason


def test_one_in_projection_for_two_consumers_gives_one_block_and_a_refusal():
    class Fused(nn.Module):
        """The first half of the rows feeds one consumer, the second half the other."""

        def __init__(self):
            super().__init__()
            self.up, self.left, self.right = nn.Linear(12, 20), nn.Linear(8, 12), nn.Linear(12, 12)

        def forward(self, x):
            left, right = self.up(x).split((self.left.in_features, self.right.in_features), -1)
            return self.left(left.relu()) + self.right(right.tanh())

    discovery = discover(Layers(Fused(), Mlp()), X)
    assert [(block.name, block.units) for block in discovery.blocks] == [
        ("layers.0.mlp", 8),
        ("layers.1.mlp", 20),
    ] or [block.consumer for block in discovery.blocks] == ["layers.0.left", "layers.1.down"]
    (refusal,) = discovery.refusals
    assert "layers.0.up.weight" in refusal.reason and "discover again" in refusal.advice


def test_training_mode_dropout_and_frozen_parameters_do_not_disturb_discovery():
    expected = discover(tiny("bert"))
    model = tiny("bert").train()
    model.bert.embeddings.eval()
    for parameter in list(model.parameters())[::2]:
        parameter.requires_grad_(False)
    next(model.parameters()).grad = torch.ones_like(next(model.parameters()))
    before = snapshot(model)
    with torch.inference_mode():
        found = discover(model)
    assert_same(before, snapshot(model))
    assert [block.name for block in found.blocks] == [block.name for block in expected.blocks]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_half_and_double_precision_models(dtype):
    model = tiny("llama").to(dtype)
    discovery = discover(model)
    assert [block.units for block in discovery.blocks] == [3, 56] * 2


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_both_attention_implementations_give_the_same_blocks(implementation):
    model = tiny("mistral", attn_implementation=implementation)
    assert [block.units for block in discover(model).blocks] == [3, 56] * 2
    assert model.config._attn_implementation == implementation


def test_own_inputs_are_used():
    model = tiny("gpt2")
    model.forward = None  # probe_inputs would fail on this
    del model.forward
    inputs = {"input_ids": torch.randint(3, 100, (1, 5))}
    assert len(discover(model, inputs).blocks) == 4


def test_a_model_on_meta_is_refused_with_advice():
    with torch.device("meta"):
        model = Layers(Mlp())
    with pytest.raises(ValueError, match="load its weights"):
        discover(model, X)


def test_a_probe_batch_that_does_not_run_is_shown():
    model = tiny("vit")
    model.config.image_size = 32  # the position embeddings are for 16
    with pytest.raises(ValueError, match=r"pixel_values \(2, 3, 32, 32\).*Pass `inputs`"):
        discover(model)


@pytest.mark.slow
def test_cost_is_linear_in_layers():
    import time

    def seconds(layers: int) -> float:
        model = tiny("bert", hidden_size=192, intermediate_size=768, num_hidden_layers=layers)
        best = float("inf")
        for _ in range(3):
            start = time.process_time()
            assert len(discover(model).blocks) == 2 * layers
            best = min(best, time.process_time() - start)
        return best

    few, many = seconds(4), seconds(16)
    assert many < 8 * few


def test_the_encoder_does_not_run_for_every_trial_of_a_decoder(monkeypatch):
    def found():
        model, calls = tiny("bart"), []
        inputs = probe_inputs(model)
        model.model.encoder.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
        return [block.name for block in discover(model, inputs).blocks], len(calls)

    names, calls = found()
    monkeypatch.setattr(discovering, "encoder_of", lambda model: None)
    expected, more = found()
    assert names == expected and calls < more


def test_of_spectrograms_one_shows_whether_a_removal_is_exact(monkeypatch):
    def found():
        model, heard = tiny("whisper"), []
        inputs = probe_inputs(model)
        model.model.encoder.register_forward_pre_hook(lambda _m, args: heard.append(len(args[0])))
        return [block.name for block in discover(model, inputs).blocks], heard

    names, heard = found()
    monkeypatch.setattr(discovering, "_compared", lambda inputs: inputs)
    expected, all_heard = found()
    assert names == expected and len(heard) == len(all_heard)
    assert all_heard.count(1) == 0 and heard.count(1) > heard.count(2)
