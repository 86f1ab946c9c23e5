import copy

import pytest
import torch
from tiny import FAMILIES, tiny
from torch import nn

from hf_subprune.blocks import by_tie
from hf_subprune.coverage import tiny_model
from hf_subprune.discovery.discover import discover
from hf_subprune.discovery.probe_inputs import probe_inputs
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
    for i, group in enumerate(by_tie(blocks), seed):
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


def test_units_of_grouped_queries_are_whole_key_value_heads():
    model = tiny("llama")  # 6 query heads of 8 columns, 3 key/value heads
    block = next(block for block in discover(model).blocks if block.kind == "attention")
    assert block.columns.tolist() == [list(range(16 * u, 16 * u + 16)) for u in range(3)]
    index = {piece.tensor.split(".")[-2]: piece.index.shape for piece in block.slices}
    assert index == {"o_proj": (3, 16), "q_proj": (3, 16), "k_proj": (3, 8), "v_proj": (3, 8)}


def test_units_of_multi_query_attention_are_query_heads_and_keys_stay():
    block = next(block for block in discover(tiny("llama_mqa")).blocks if block.kind == "attention")
    assert block.columns.shape == (6, 8)
    assert {piece.tensor.split(".")[-2] for piece in block.slices} == {"o_proj", "q_proj"}


def test_interleaved_query_groups_are_found_by_what_they_share():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.kv, self.o = nn.Linear(12, 16), nn.Linear(12, 16), nn.Linear(16, 12)

        def forward(self, x):
            q = self.q(x).unflatten(-1, (-1, 4)).transpose(1, 2)
            k, v = self.kv(x).unflatten(-1, (2, -1, 4)).permute(2, 0, 3, 1, 4)
            k, v = k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1)  # query head h reads key/value head h % 2
            scores = (q @ k.transpose(-1, -2)).softmax(-1)
            return self.o((scores @ v).transpose(1, 2).flatten(2))

    block = discover(Layers(Attention(), Attention()), {"x": torch.randn(2, 5, 12)}).blocks[0]
    assert block.kind == "attention"
    assert block.columns.tolist() == [[0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]]


class Layers(nn.Module):
    """Hand-made layers on a residual stream."""

    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


class Mlp(nn.Module):
    def __init__(self, width: int = 20, between=None):
        super().__init__()
        self.up, self.down = nn.Linear(12, width), nn.Linear(width, 12)
        self.between = between if between is not None else nn.ReLU()

    def forward(self, x):
        return self.down(self.between(self.up(x)))


class Normalized(nn.Module):
    """Divides by a norm without weights: every column depends on every row, no parameter betrays it."""

    def forward(self, x):
        return x.relu() / (1 + x.norm(dim=-1, keepdim=True))


class Centred(nn.Module):
    """Part of the columns mix, the others do not."""

    def forward(self, x):
        mixed, plain = x.relu().chunk(2, -1)
        return torch.cat([mixed - mixed.mean(-1, keepdim=True), plain], -1)


X = {"x": torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0))}


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


class Turned(nn.Module):
    """Another order of the features, with no parameter that betrays it."""

    def forward(self, x):
        return x.relu().flip(-1)


class Gated(nn.Module):
    """Half of the features gate the other half: side by side, or in turns."""

    def __init__(self, in_turns: bool):
        super().__init__()
        self.up, self.down, self.in_turns = nn.Linear(12, 32), nn.Linear(16, 12), in_turns

    def forward(self, x):
        x = self.up(x)
        gate, up = (x[..., ::2], x[..., 1::2]) if self.in_turns else x.chunk(2, -1)
        return self.down(gate.sigmoid() * up)


class Attention(nn.Module):
    """Fused queries, keys and values of heads of any width."""

    def __init__(self, heads: int):
        super().__init__()
        self.qkv, self.o, self.heads = nn.Linear(12, 48), nn.Linear(16, 12), heads

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return self.o((q @ k.transpose(-1, -2) / 4).softmax(-1).matmul(v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize(
    ("first", "other"),
    [
        (Mlp(between=nn.ReLU()), Mlp(between=Turned())),
        (Gated(in_turns=False), Gated(in_turns=True)),
        (Attention(heads=4), Attention(heads=2)),
        (Mlp(between=nn.ReLU()), Mlp(between=Normalized())),
        (Mlp(between=Normalized()), Mlp(between=nn.ReLU())),
    ],
    ids=["order", "gates", "heads", "norm second", "norm first"],
)
def test_a_layer_with_the_shapes_of_the_one_before_has_a_map_of_its_own(first, other):
    def of_second(model):
        return {
            (piece.tensor, str(piece.index.tolist()))
            for block in discover(model, X).blocks
            if block.name.startswith("layers.1")
            for piece in block.slices
        }

    shapes = [[(name, p.shape) for name, p in layer.named_parameters()] for layer in (first, other)]
    assert shapes[0] == shapes[1]
    found = of_second(Layers(first, other))
    assert found == of_second(Layers(nn.Identity(), other))  # as where there is no layer before
    assert found != of_second(Layers(first, copy.deepcopy(first)))


def test_heads_behind_a_norm_over_all_heads_are_refused_by_name():
    refusals = [one for one in discover(tiny("olmo2")).refusals if one.kind == "attention"]
    assert [one.name for one in refusals] == [f"model.layers.{i}.self_attn" for i in range(3)]
    assert "k_proj" in refusals[0].reason and "q_proj" in refusals[0].reason


def test_a_producer_that_feeds_two_consumers_is_refused():
    class Fork(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.left, self.right = nn.Linear(12, 20), nn.Linear(20, 12), nn.Linear(20, 12)

        def forward(self, x):
            hidden = self.up(x).relu()
            return self.left(hidden) - self.right(hidden.square())

    discovery = discover(Layers(Fork(), Mlp()), X)
    assert [block.name for block in discovery.blocks] == ["layers.1.mlp"]
    assert {(one.name, one.reason) for one in discovery.refusals} == {
        ("layers.0.left", "rows of 'layers.0.up' that its units own also feed 'layers.0.right'"),
        ("layers.0.right", "rows of 'layers.0.up' that its units own also feed 'layers.0.left'"),
    }


def test_a_producer_whose_output_the_model_returns_is_refused():
    class Peek(nn.Module):
        def __init__(self):
            super().__init__()
            self.stack = Layers(Mlp(), Mlp())
            self.seen = None
            self.stack.layers[0].up.register_forward_hook(lambda _, __, output: setattr(self, "seen", output))

        def forward(self, x):
            return self.stack(x), self.seen

    model = Peek()
    model(**X)
    assert [block.name for block in discover(model, X).blocks] == ["stack.layers.1.mlp"]


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


def test_a_layer_that_overwrites_what_it_needs_for_gradients_is_refused():
    class Overwriting(nn.Module):
        def forward(self, x):
            squared = x.exp()
            out = squared.sin()
            squared.zero_()
            return out

    discovery = discover(Layers(Mlp(between=Overwriting()), Mlp()), X)
    assert [block.name for block in discovery.blocks] == ["layers.1.mlp"]
    assert "cannot be differentiated" in discovery.refusals[0].reason


def test_tied_producers_are_refused():
    model = Layers(Mlp(), Mlp(), Mlp())
    model.layers[1].up.weight = model.layers[0].up.weight
    discovery = discover(model, X)
    assert [block.name for block in discovery.blocks] == ["layers.2.mlp"]
    assert ["tied to" in refusal.reason for refusal in discovery.refusals] == [True, True]


def test_a_depthwise_convolution_between_producer_and_consumer_shrinks_along():
    class Depthwise(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(20, 20, 3, padding=1, groups=20)
            nn.init.normal_(self.conv.bias, std=0.01)

        def forward(self, x):
            return self.conv(x.transpose(1, 2)).transpose(1, 2).relu()

    block = discover(Layers(Mlp(between=Depthwise()), Mlp()), X).blocks[0]
    assert (block.kind, block.units, block.parameters_per_unit) == ("mlp", 20, 12 + 1 + 3 + 1 + 12)


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
    assert [block.units for block in discovery.blocks] == [3, 56] * 3


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_both_attention_implementations_give_the_same_blocks(implementation):
    model = tiny("mistral", attn_implementation=implementation)
    assert [block.units for block in discover(model).blocks] == [3, 56] * 3
    assert model.config._attn_implementation == implementation


def test_own_inputs_are_used():
    model = tiny("gpt2")
    model.forward = None  # probe_inputs would fail on this
    del model.forward
    inputs = {"input_ids": torch.randint(3, 100, (1, 5))}
    assert len(discover(model, inputs).blocks) == 6


def test_a_model_on_meta_is_refused_with_advice():
    with torch.device("meta"):
        model = Layers(Mlp())
    with pytest.raises(ValueError, match="load its weights"):
        discover(model, X)


def test_inputs_that_cannot_be_made_are_asked_for():
    class Odd(nn.Module):
        main_input_name = "measurements"
        config = tiny("bert").config

        def forward(self, measurements):
            return measurements

    with pytest.raises(ValueError, match=r"measurements.*Pass `inputs`"):
        probe_inputs(Odd())


def test_a_probe_batch_that_does_not_run_is_shown():
    model = tiny("vit")
    model.config.image_size = 32  # the position embeddings are for 16
    with pytest.raises(ValueError, match=r"pixel_values \(2, 3, 32, 32\).*Pass `inputs`"):
        discover(model)


@pytest.mark.parametrize("family", ["bert", "vit", "clip", "whisper", "t5", "wav2vec2"])
def test_probe_inputs_run(family):
    model = tiny(family)
    inputs = probe_inputs(model)
    assert all(len(value) == 2 for value in inputs.values())
    with torch.no_grad():
        outputs = list(floating_tensors(model(**inputs)))
    assert outputs and all(output.isfinite().all() for output in outputs)


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


@pytest.mark.parametrize(
    ("model_type", "name", "kind", "attributes"),
    [
        # Another block of the same layer removes rows of the consumer.
        ("swinv2", "encoder.layers.0.blocks.0.attention.self.continuous_position_bias_mlp", "mlp", set()),
        # Its forward keeps what it computed from a parameter in a dictionary.
        ("levit", "encoder.stages.0.layers.0.attention", "attention", {"num_attention_heads", "out_dim_projection"}),
        # Widths say how a fused projection is split.
        ("qwen3_5_text", "layers.0.attention", "attention", {"num_v_heads", "num_k_heads", "key_dim", "value_dim"}),
    ],
)
def test_blocks_that_take_more_than_their_own_tensors(model_type, name, kind, attributes):
    blocks = {block.name: block for block in discover(tiny_model(model_type)).blocks}
    assert blocks[name].kind == kind
    assert {attribute.name for attribute in blocks[name].attributes} == attributes


def test_a_single_head_is_refused():
    refusals = discover(tiny_model("segformer")).refusals
    assert any(one.kind == "whole" and "single head" in one.reason for one in refusals)


@pytest.mark.parametrize(
    ("model_type", "name", "reason"),
    [
        # A function is given the weights of linears.
        ("wavlm", "encoder.layers.0.attention", "is multiplied by other code"),
        # Without a GPU its attention is zero.
        ("mra", "encoder.layer.0.attention.self", "nothing in this forward depends on"),
        ("squeezebert", "encoder.layers.0.attention.query", "a convolution in 4 groups"),
    ],
)
def test_what_is_no_linear_or_does_not_run_is_refused_by_name(model_type, name, reason):
    refusals = {refusal.name: refusal for refusal in discover(tiny_model(model_type)).refusals}
    assert refusals[name].kind == "unknown" and reason in refusals[name].reason


class Heads(nn.Module):
    """Heads of three features under a mask, with keys under a norm that they share."""

    def __init__(self, mask: float, fused: bool = False):
        super().__init__()
        self.mask, self.fused = mask, fused
        self.qkv, self.norm, self.out = nn.Linear(12, 108), nn.LayerNorm(3), nn.Linear(36, 12)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, 3)).permute(2, 0, 3, 1, 4)
        k, mask = self.norm(k), self.mask * (1 - torch.eye(x.shape[1]))
        if self.fused:
            heads = nn.functional.scaled_dot_product_attention(q, k, v, mask)
        else:
            heads = nn.functional.softmax(q @ k.transpose(-2, -1) + mask, dim=-1) @ v
        return self.out(heads.transpose(1, 2).flatten(-2))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("mask", [0.0, -100.0])
def test_heads_are_told_apart_where_gradients_all_but_vanish(fused, mask):
    # Those through exp(-100), and that of the bias of a norm of keys, are zero for some heads and not for others.
    torch.manual_seed(0)
    blocks = discover(Layers(Heads(mask, fused), Heads(mask, fused)), X).blocks
    assert [(block.kind, block.units, block.columns.shape[1]) for block in blocks] == [("attention", 12, 3)] * 2


def test_what_a_model_runs_without_gradients_is_found_as_well():
    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = Layers(Mlp(), Mlp())

        def forward(self, x):
            with torch.no_grad():
                return self.layers(x)

    model = Frozen()
    assert len(discover(model, X).blocks) == 2
    assert not model(**X).requires_grad


def test_features_that_two_linears_read_alike_are_a_stream():
    refusals = {refusal.name: refusal for refusal in discover(tiny_model("mobilebert")).refusals}
    query = refusals["encoder.layer.0.attention.self.query"]
    assert query.kind == "whole" and "bottleneck.attention.dense" in query.reason


def test_modules_that_are_never_run_are_as_those_that_are():
    class Optional(nn.Module):
        def __init__(self, runs):
            super().__init__()
            self.runs, self.mlp, self.extra = runs, Mlp(), nn.Linear(12, 12)

        def forward(self, x):
            return self.extra(self.mlp(x)) if self.runs else x

    refusals = discover(Layers(Optional(True), Optional(False)), X).refusals
    kinds = {refusal.name: refusal.kind for refusal in refusals if "does not reach it" in refusal.reason}
    assert kinds == {"layers.1.mlp": "mlp", "layers.1": "whole"}
