import pytest
import torch
from tiny import tiny
from torch import nn

from hf_subprune.coverage import tiny_model
from hf_subprune.coverage.survey import examine, outputs, relative_difference
from hf_subprune.discovery.discover import discover
from hf_subprune.discovery.probe_inputs import probe_inputs
from hf_subprune.models.forwards import INNER_WIDTH
from hf_subprune.models.running import floating_tensors
from hf_subprune.surgery.edits import shrink
from hf_subprune.surgery.masking import masked


@pytest.mark.parametrize(
    ("model_type", "kind", "cut"),
    [
        ("mpt", "attention", {"position_bias"}),
        # Products with what an embedding outside of the layers hands to each of them.
        ("gemma4_text", "mlp", {"per_layer_input"}),
        # Without any, but with a forward that takes the width of the heads to be that of its input.
        ("trocr", "attention", set()),
    ],
)
def test_what_a_forward_is_given_or_derives_follows_the_units_and_is_stored(model_type, kind, cut):
    blocks = [block for block in discover(tiny_model(model_type)).blocks if block.kind == kind]
    found = [{argument.name for argument in block.arguments} for block in blocks]
    assert len(blocks) > 1 and cut in found
    if not cut:
        assert all(INNER_WIDTH in {one.name for one in block.attributes} for block in blocks)
    row = examine(model_type, "base")
    assert (row.kinds[kind].verdict, row.layout, row.reload) == ("exact", "ragged", "exact")


def test_heads_with_biases_are_removed_twice():
    model = tiny("bloom")
    inputs = probe_inputs(model)
    for keep in ([0, 2, 3], [1, 2]):
        blocks = [block for block in discover(model).blocks if block.kind == "attention"]
        first = blocks[0]
        with torch.no_grad(), masked(model.get_submodule(first.consumer), first, keep):
            expected = list(floating_tensors(model(**inputs)))
        shrink(model, first, keep)
        assert relative_difference(expected, outputs(model, inputs)) < 1e-5
    kept = [buffer.tolist() for name, buffer in model.named_buffers() if name.endswith(".kept_alibi")]
    assert kept == [[2, 3]]


def test_a_producer_outside_of_the_layer_stays_whole():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

        def forward(self, x, gate):
            return x + self.down(self.up(x).tanh() * gate)

    class Layers(nn.Module):
        def __init__(self):
            super().__init__()
            self.gates = nn.ModuleList(nn.Linear(8, 12) for _ in range(2))
            self.layers = nn.ModuleList(Gated() for _ in range(2))

        def forward(self, x):
            for layer, gate in zip(self.layers, self.gates, strict=True):
                x = layer(x, gate(x))
            return x

    blocks = discover(Layers(), {"x": torch.randn(2, 5, 8)}).blocks
    assert len(blocks) == 2
    assert all({argument.name for argument in block.arguments} == {"gate"} for block in blocks)
    assert not any(piece.tensor.startswith("gates.") for block in blocks for piece in block.slices)
