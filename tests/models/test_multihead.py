"""`nn.MultiheadAttention`: what its forward computes, taken apart, shrunk, put together again, stored."""

import copy
import importlib.util

import pytest
import torch
from same import assert_same_weights
from torch import nn

from hf_subprune import PruneConfig, prune
from hf_subprune.coverage.survey import examine, outputs, relative_difference
from hf_subprune.coverage.tiny import tiny_model
from hf_subprune.discovery.discover import discover
from hf_subprune.discovery.probe_inputs import probe_inputs
from hf_subprune.models.forms import apart, put_together, take_apart
from hf_subprune.models.forwards import INNER_WIDTH
from hf_subprune.storage.layout import choose_layout
from hf_subprune.storage.remote_code import write_remote_code
from hf_subprune.storage.skeleton import read_back
from hf_subprune.surgery.edits import shrink
from hf_subprune.surgery.masking import masked

Q, L, S, HEADS = 2, 5, 7, 4


class Layers(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.layers = nn.ModuleList(nn.MultiheadAttention(16, HEADS, batch_first=True, **options) for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x, x, x, need_weights=False)[0]
        return x


def layers(**options) -> tuple[Layers, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model = Layers(**options).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model, {"x": torch.randn(Q, L, 16)}


def bool_mask(*shape: int) -> torch.Tensor:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.4
    mask[..., 0] = False  # something is always looked at
    return mask


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize(
    "masks",
    [
        {},
        {"key_padding_mask": bool_mask(Q, S)},
        {"attn_mask": bool_mask(L, S)},
        {"attn_mask": bool_mask(Q * HEADS, L, S), "key_padding_mask": bool_mask(Q, S)},
        {"attn_mask": torch.randn(L, S), "average_attn_weights": False},
    ],
)
def test_the_forward_computes_what_that_of_torch_does(bias, batch_first, need_weights, masks):
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(16, HEADS, bias=bias, batch_first=batch_first).eval()
    query, key, value = torch.randn(Q, L, 16), torch.randn(Q, S, 16), torch.randn(Q, S, 16)
    if not batch_first:
        query, key, value = (one.transpose(0, 1) for one in (query, key, value))
    expected = attention(query, key, value, need_weights=need_weights, **masks)
    with apart(attention.modules()):
        assert attention.in_proj_weight is None
        found = attention(query, key, value, need_weights=need_weights, **masks)
    torch.testing.assert_close(found, expected)


def test_inputs_without_a_batch():
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(16, HEADS).eval()
    query, key = torch.randn(L, 16), torch.randn(S, 16)
    masks = {"key_padding_mask": bool_mask(S), "attn_mask": bool_mask(HEADS, L, S)}
    expected = attention(query, key, key, **masks)
    with apart(attention.modules()):
        torch.testing.assert_close(attention(query, key, key, **masks), expected)


def test_what_is_not_shrunk_comes_back_as_it_was():
    model, inputs = layers(bias=False)
    before, tensors = dict(model.named_parameters()), {name: vars(m).copy() for name, m in model.named_modules()}
    weight, expected = model.layers[0].in_proj_weight.detach().clone(), model(**inputs)
    with apart(model.modules()):
        assert {name for name, _ in model.layers[0].named_children()} == {"q_proj", "k_proj", "v_proj", "out_proj"}
        with torch.no_grad():  # views: what is written is written to the stack
            model.layers[0].k_proj.weight.mul_(2)
            model.layers[0].q_proj.weight.div_(2)
        torch.testing.assert_close(model(**inputs), expected)
    assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, p in before.items()}
    assert all(vars(module).keys() == tensors[name].keys() for name, module in model.named_modules())
    torch.testing.assert_close(model(**inputs), expected)
    assert not torch.equal(model.layers[0].in_proj_weight, weight)


@pytest.mark.parametrize("bias", [True, False])
def test_heads_are_removed_exactly_and_come_back(bias):
    model, inputs = layers(bias=bias)
    discovery = discover(model, inputs)
    assert [(block.kind, block.units) for block in discovery.blocks] == [("attention", HEADS)] * 2
    assert not discovery.refusals
    first = discovery.blocks[0]
    original = copy.deepcopy(model)
    modules = take_apart(model.modules())
    with torch.no_grad(), masked(model.get_submodule(first.consumer), first, [1, 3]):
        expected = model(**inputs)
    edit = shrink(model, first, [1, 3])
    again = put_together(modules)
    attention = model.layers[0]
    assert attention.in_proj_weight.shape == (24, 16) and attention.out_proj.weight.shape == (16, 8)
    assert (attention.num_heads, vars(attention)[INNER_WIDTH]) == (2, 8)
    torch.testing.assert_close(model(**inputs), expected)
    again()
    edit.undo()
    put_together(modules)
    assert INNER_WIDTH not in vars(attention) and "forward" not in vars(attention)
    assert_same_weights(model, original)
    torch.testing.assert_close(model(**inputs), original(**inputs))


def test_heads_are_removed_twice():
    model, inputs = layers()
    for keep in ([0, 2, 3], [1, 2]):
        first = discover(model, inputs).blocks[0]
        with apart(model.modules()):
            with torch.no_grad(), masked(model.get_submodule(first.consumer), first, keep):
                expected = model(**inputs)
            shrink(model, first, keep)
        torch.testing.assert_close(model(**inputs), expected)
    assert model.layers[0].num_heads == 2


def test_shrinking_what_is_not_apart_says_what_to_do():
    model, inputs = layers()
    with pytest.raises(ValueError, match=r"inside of `models.forms.apart\(model"):
        shrink(model, discover(model, inputs).blocks[0], [0])


def test_biases_beside_the_keys_are_refused():
    model, inputs = layers(add_bias_kv=True)
    discovery = discover(model, inputs)
    assert not discovery.blocks
    assert any("is multiplied by other code" in one.reason for one in discovery.refusals)


def test_masks_by_head_are_cut_and_all_is_stored():
    blocks = [block for block in discover(tiny_model("mask2former")).blocks if block.name.endswith("cross_attn")]
    assert [(argument.name, argument.entries) for argument in blocks[0].arguments] == [("attn_mask", HEADS)]


def test_pruned_heads_are_stored_and_load_with_and_without_the_package(tmp_path):
    row = examine("bridgetower_vision_model", "base")
    assert (row.kinds["attention"].verdict, row.layout, row.reload) == ("exact", "ragged", "exact")

    model = tiny_model("bridgetower")
    inputs = probe_inputs(model)
    with apart(model.modules()):
        for block in discover(model, inputs).blocks:
            shrink(model, block, block.first(block.units // 2))
    choose_layout(model, "ragged", inputs=inputs)
    model.save_pretrained(tmp_path)
    file = write_remote_code(tmp_path, model)
    spec = importlib.util.spec_from_file_location(file.stem, file)
    code = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(code)
    rebuilt = code.BridgeTowerModel(read_back(model.config)).eval()
    rebuilt.load_state_dict(model.state_dict())
    assert relative_difference(outputs(model, inputs), outputs(rebuilt, inputs)) < 1e-5


def test_prune_reweights_what_its_heads_feed():
    model = tiny_model("bridgetower_vision_model")
    before = copy.deepcopy(model)
    random = torch.Generator().manual_seed(0)
    batches = [{"image": torch.randn(2, 3, 64, 64, generator=random)} for _ in range(6)]
    report = prune(model, batches, PruneConfig(keep=0.5, units=("attention",), shrinkage=0.1, budget="uniform"))
    assert [len(block.kept_units) for block in report.blocks] == [2, 2]
    assert report.layout == "ragged" and "adapts the forward" in report.layout_reason
    attention = model.visual.transformer.resblocks[0].attn
    assert attention.num_heads == 2 and attention.in_proj_weight.shape[0] * 2 == attention.embed_dim * 3
    original = before.visual.transformer.resblocks[0].attn.out_proj.weight
    columns = [torch.equal(attention.out_proj.weight[:, :64], original[:, i : i + 64]) for i in range(0, 256, 64)]
    assert not any(columns)
