from dataclasses import replace

import pytest
import torch
from tiny import tiny
from torch import nn

from hf_subprune.blocks import Slice
from hf_subprune.discovery.discover import discover
from hf_subprune.discovery.probe_inputs import probe_inputs
from hf_subprune.surgery.verification import EquivalenceError, verify


def evens(blocks) -> dict:
    return {block.name: torch.arange(0, block.units, 2) for block in blocks}


def wrong(block):
    """The block with the rows of its first producer assigned to the wrong units."""
    consumer, producer, *others = block.slices
    return replace(block, slices=(consumer, Slice(producer.tensor, producer.dim, producer.index.roll(1, 0)), *others))


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_right_blocks_pass_and_the_model_is_unchanged(family):
    model = tiny(family).train()
    before = {name: (parameter, parameter.detach().clone()) for name, parameter in model.named_parameters()}
    blocks = discover(model).blocks
    assert 0 <= verify(model, blocks, evens(blocks), probe_inputs(model)) < 1e-5
    assert model.training
    for name, parameter in model.named_parameters():
        assert parameter is before[name][0] and torch.equal(parameter, before[name][1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "bart", "vit", "wav2vec2"])
def test_rounding_is_told_from_a_difference_in_float64(family, dtype):
    sizes = {"intermediate_size": 3072} if family == "llama" else {}  # sums so long are made in another order
    model = tiny(family, **sizes).to(dtype)
    inputs, blocks = probe_inputs(model), discover(model).blocks
    assert verify(model, blocks, evens(blocks), inputs, tolerance=1e-10) < 1e-10
    with torch.no_grad():  # a wrong block that makes next to no difference
        model.get_parameter(wrong(blocks[0]).slices[0].tensor).mul_(1e-6)
    with pytest.raises(EquivalenceError, match="differs from the masked original's"):
        verify(model, [wrong(blocks[0]), *blocks[1:]], evens(blocks), inputs, tolerance=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["gpt2", "llama", "bart", "vit", "wav2vec2"])
def test_a_wrong_map_is_named_in_any_precision(family, dtype):
    model = tiny(family).to(dtype)
    inputs = probe_inputs(model)
    blocks = discover(model).blocks
    assert verify(model, blocks, evens(blocks), inputs) < 1e-5
    broken = [wrong(block) if i == 2 else block for i, block in enumerate(blocks)]
    parameters = list(model.parameters())
    with pytest.raises(EquivalenceError, match="differs from the masked original's") as error:
        verify(model, broken, evens(blocks), inputs)
    assert error.value.block == blocks[2].name
    assert error.value.producers and all(name in str(error.value) for name in error.value.producers)
    assert blocks[2].consumer in str(error.value)
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))


def test_a_block_with_next_to_no_part_in_the_output_cannot_hide():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)
            self.scale = nn.Parameter(torch.tensor(1e-9))

        def forward(self, x):
            return x + self.scale * self.down(self.up(x).tanh())

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Gated(), Gated()])

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    model, inputs = Model(), {"x": torch.randn(2, 3, 8)}
    blocks = discover(model, inputs).blocks
    broken = [blocks[0], wrong(blocks[1])]
    with pytest.raises(EquivalenceError) as error:
        verify(model, broken, evens(blocks), inputs)
    assert error.value.block == blocks[1].name


def test_a_block_that_breaks_the_forward_is_found_among_all():
    model = tiny("gpt2")
    blocks = discover(model).blocks
    broken = [replace(block, attributes=()) if "h.1.attn" in block.name else block for block in blocks]
    with pytest.raises(EquivalenceError, match="cannot run") as error:
        verify(model, broken, evens(blocks), probe_inputs(model))
    assert error.value.block == "transformer.h.1.attn"
    assert model.transformer.h[0].attn.num_heads == 4


def test_blocks_that_clash_only_together_are_reported():
    model = tiny("gpt2")
    blocks = discover(model).blocks
    with pytest.raises(EquivalenceError, match="each of 2 blocks can be shrunk alone"):
        verify(model, [blocks[1], replace(blocks[1])], evens(blocks), probe_inputs(model))


def test_not_a_number_is_not_equal():
    model = tiny("bert")
    blocks = discover(model).blocks
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.bias[0] = torch.nan
    inputs = probe_inputs(model)
    assert verify(model, blocks[1:2], evens(blocks), inputs, to_consumer=True) < 1e-5  # the same entries are NaN
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.bias[0] = 0
        # NaN in a removed unit's own column: the mask keeps it out, a wrong map lets it in.
        model.bert.encoder.layer[0].intermediate.dense.weight[0] = torch.nan
    keep = {blocks[1].name: torch.arange(1, blocks[1].units)}
    assert verify(model, blocks[1:2], keep, inputs) < 1e-5
    with pytest.raises(EquivalenceError, match="not finite"):
        verify(model, [wrong(blocks[1])], keep, inputs)
