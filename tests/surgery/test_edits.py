import copy

import pytest
import torch
from same import assert_same_weights
from tiny import tiny

from hf_subprune.blocks import Block
from hf_subprune.discovery.discover import discover
from hf_subprune.discovery.probe_inputs import probe_inputs
from hf_subprune.surgery.edits import kept_columns, shrink
from hf_subprune.surgery.masking import masked


def block_of(model, kind: str = "mlp", layer: int = 0) -> Block:
    return [block for block in discover(model).blocks if block.kind == kind][layer]


def state(model) -> dict:
    return {name: (parameter, parameter.detach().clone()) for name, parameter in model.named_parameters()}


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(**probe_inputs(model))[0]


def assert_restored(model, before: dict) -> None:
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    for name, (parameter, value) in before.items():
        assert after[name] is parameter
        assert torch.equal(parameter, value)


def test_shrinking_an_mlp_slices_producer_rows_consumer_columns_and_sizes():
    model = tiny("bert")
    layer = model.bert.encoder.layer[1]
    up, down = layer.intermediate.dense, layer.output.dense
    weights = [tensor.detach().clone() for tensor in (up.weight, up.bias, down.weight, down.bias)]
    kept = [0, 5, 6, 55]
    edit = shrink(model, block_of(model, layer=1), kept)
    assert torch.equal(up.weight, weights[0][kept]) and torch.equal(up.bias, weights[1][kept])
    assert torch.equal(down.weight, weights[2][:, kept]) and torch.equal(down.bias, weights[3])
    assert (up.in_features, up.out_features, down.in_features, down.out_features) == (48, 4, 4, 48)
    assert edit.block == "bert.encoder.layer.1.mlp" and edit.kept.tolist() == kept


def test_shrinking_fused_heads_keeps_query_key_and_value_in_order():
    model = tiny("gpt2")
    attention = model.transformer.h[0].attn
    fused, out = attention.c_attn.weight.detach().clone(), attention.c_proj.weight.detach().clone()
    shrink(model, block_of(model, "attention"), [1, 3])
    columns = [*range(12, 24), *range(36, 48)]
    assert torch.equal(attention.c_attn.weight, torch.cat([part[:, columns] for part in fused.chunk(3, 1)], 1))
    assert torch.equal(attention.c_proj.weight, out[columns])
    assert (attention.c_attn.nx, attention.c_attn.nf, attention.c_proj.nx, attention.c_proj.nf) == (48, 72, 24, 48)
    assert (attention.num_heads, attention.split_size) == (2, 24)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "phi3"])
@pytest.mark.parametrize("kind", ["mlp", "attention"])
def test_undo_restores_identity_values_and_attributes_and_redo_the_surgery(family, kind):
    model = tiny(family)
    before, expected, text = state(model), logits(model), str(model)
    configs = [id(module.__dict__.get("config")) for module in model.modules()]
    block = block_of(model, kind)
    edit = shrink(model, block, range(1, block.units))
    shrunk, pruned, small = state(model), logits(model), str(model)
    assert small != text and not torch.equal(pruned, expected)
    edit.undo()
    assert_restored(model, before)
    assert str(model) == text and torch.equal(logits(model), expected)
    assert [id(module.__dict__.get("config")) for module in model.modules()] == configs
    edit.redo()
    assert_restored(model, shrunk)
    assert str(model) == small and torch.equal(logits(model), pruned)


def test_edits_are_undone_in_reverse_order_only():
    model = tiny("gpt2")
    before = state(model)
    block = block_of(model)
    first = shrink(model, block, range(40))
    second = shrink(model, block_of(model), range(10))
    with pytest.raises(RuntimeError, match="reverse of the order"):
        first.undo()
    with pytest.raises(RuntimeError, match="redo"):
        second.redo()
    second.undo()
    first.undo()
    assert_restored(model, before)


def test_all_units_kept_is_the_identity():
    model = tiny("bart")
    before, expected = copy.deepcopy(model), logits(model)
    for block in discover(model).blocks:
        shrink(model, block, range(block.units))
    assert_same_weights(model, before)
    torch.testing.assert_close(logits(model), expected)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_new_consumer_weights_are_inputs_by_outputs_of_the_kept_columns(family):
    model = tiny(family)
    block = block_of(model, "attention")
    consumer = model.get_submodule(block.consumer)
    kept = [0, 2]
    columns = kept_columns(block, kept)
    assert columns.tolist() == [*range(12), *range(24, 36)]
    weight, bias = torch.randn(24, 48, dtype=torch.float64), torch.randn(48, dtype=torch.float64)
    edit = shrink(model, block, kept, weight, bias)
    x = torch.randn(3, 24)
    torch.testing.assert_close(consumer(x), x @ weight.float() + bias.float())
    assert consumer.weight.dtype == torch.float32 and consumer.weight.is_contiguous()
    weight.zero_()
    assert consumer.weight.abs().sum() > 0  # the model owns its copy
    edit.undo()
    assert consumer.weight.shape == (48, 48)


def test_a_new_bias_alone_replaces_only_the_bias():
    model = tiny("bert")
    block = block_of(model)
    consumer = model.get_submodule(block.consumer)
    sliced = consumer.weight[:, [1, 2]].clone()
    shrink(model, block, [1, 2], bias=torch.ones(48))
    assert torch.equal(consumer.weight, sliced) and torch.equal(consumer.bias, torch.ones(48))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_gradient_flags_and_marks_are_kept(dtype):
    model = tiny("bert").to(dtype)
    block = block_of(model)
    frozen = model.get_submodule(block.consumer).weight
    frozen.requires_grad_(False)
    frozen.mark = "kept"
    untouched = {id(p) for p in model.parameters()}
    shrink(model, block, [3, 4])
    weight = model.get_submodule(block.consumer).weight
    assert (weight.dtype, weight.requires_grad, weight.mark) == (dtype, False, "kept")
    assert model.bert.encoder.layer[0].intermediate.dense.weight.requires_grad
    assert all(p.dtype == dtype for p in model.parameters())
    assert len(untouched & {id(p) for p in model.parameters()}) == len(untouched) - 3


def test_tied_embeddings_stay_tied():
    model = tiny("gpt2")
    for block in discover(model).blocks:
        shrink(model, block, [0])
    assert model.lm_head.weight is model.transformer.wte.weight


def test_a_shrunk_model_trains_and_deep_copies():
    model = tiny("llama")
    for block in discover(model).blocks:
        shrink(model, block, [0, 2])
    twin = copy.deepcopy(model)
    inputs = probe_inputs(model)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())
    assert_same_weights(twin, model)
    torch.testing.assert_close(logits(twin), logits(model))


def test_masking_zeroes_removed_columns_even_if_they_are_infinite():
    model = tiny("bert")
    block = block_of(model, "attention")
    consumer = model.get_submodule(block.consumer)
    x = torch.full((2, 48), torch.inf)
    x[:, 12:24] = torch.randn(2, 12)
    with masked(model.get_submodule(block.consumer), block, [1]):
        found = consumer(x)
        named = consumer(input=x)
    torch.testing.assert_close(found, x[:, 12:24] @ consumer.weight[:, 12:24].T + consumer.bias)
    assert torch.equal(named, found)
    assert not consumer(x).isfinite().any()


@pytest.mark.parametrize(
    ("kept", "found"),
    [
        ([2, 1], "strictly increasing"),
        ([1, 1], "strictly increasing"),
        ([-1, 2], "within 0..55"),
        ([3, 56], "within 0..55"),
        ([0.0, 1.0], "float32"),
        ([[0, 1]], r"\(1, 2\)"),
        (torch.ones(56, dtype=torch.bool), "bool"),
    ],
)
def test_wrong_units_are_refused_and_nothing_changes(kept, found):
    model = tiny("bert")
    block, before = block_of(model), state(model)
    for act in (shrink, kept_columns):
        with pytest.raises(ValueError, match=found) as error:
            act(*([model] if act is shrink else []), block, kept)
        assert block.name in str(error.value)
    with pytest.raises(ValueError, match=found), masked(model.get_submodule(block.consumer), block, kept):
        pass
    assert_restored(model, before)


def test_wrong_weights_are_refused_and_nothing_changes():
    model = tiny("llama")
    block, before = block_of(model), state(model)
    with pytest.raises(ValueError, match=r"shape \(2, 48\).*found \(48, 2\)"):
        shrink(model, block, [0, 1], torch.zeros(48, 2))
    with pytest.raises(ValueError, match="has none"):
        shrink(model, block, [0, 1], bias=torch.zeros(48))
    assert_restored(model, before)


def test_a_block_of_another_state_of_the_model_is_refused():
    model = tiny("gpt2")
    mlp, attention = block_of(model), block_of(model, "attention")
    shrink(model, mlp, range(10))
    shrink(model, attention, range(2))
    before = state(model)
    for stale in (mlp, attention):
        with pytest.raises(ValueError, match="Discover the blocks of this model again"):
            shrink(model, stale, [0])
    with pytest.raises(ValueError, match="no module 'transformer"):
        shrink(tiny("llama"), mlp, [0])
    assert_restored(model, before)
