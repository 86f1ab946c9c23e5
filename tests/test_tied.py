import pytest
import torch
from tiny import tiny
from torch import nn

from hf_subprune.blocks import by_tie
from hf_subprune.probe import discover, probe_inputs
from hf_subprune.verification import verify

TIES = {
    "t5": {
        "encoder.block.*.layer.0.SelfAttention",
        "decoder.block.*.layer.0.SelfAttention",
        "decoder.block.*.layer.1.EncDecAttention",
    },
    "mpnet": {"encoder.layer.*.attention.attn"},
}


def heads(model):
    return [block for block in discover(model).blocks if block.kind == "attention"]


@pytest.mark.parametrize("family", TIES)
def test_the_heads_of_all_layers_of_a_stack_are_tied(family):
    discovery = discover(tiny(family))
    assert not discovery.refusals
    groups = [group for group in by_tie(discovery.blocks) if group[0].kind == "attention"]
    assert {group[0].tie for group in groups} == TIES[family]
    assert all(len(group) == 3 for group in groups)
    assert all(block.tie is None for block in discovery.blocks if block.kind == "mlp")


@pytest.mark.parametrize("family", TIES)
def test_the_bias_table_belongs_to_the_first_layer_alone(family):
    model = tiny(family)
    tables = {name for name, _ in model.named_parameters() if "relative_attention_bias" in name}
    shared = {piece.tensor: block for block in heads(model) for piece in block.slices if piece.shared}
    assert set(shared) == tables
    for table, block in shared.items():
        first, *others = (one for one in heads(model) if one.tie == block.tie)
        assert first.name == block.name
        columns = model.get_parameter(table).shape[0]
        assert {one.parameters_per_unit for one in others} == {first.parameters_per_unit - columns}


def test_tied_blocks_can_only_be_verified_with_equal_units():
    model = tiny("mpnet")
    blocks = heads(model)
    kept = {block.name: [0, i + 1] for i, block in enumerate(blocks)}
    with pytest.raises(ValueError, match=r"are tied \('encoder\.layer\.\*\.attention\.attn'\)"):
        verify(model, blocks, kept, probe_inputs(model))
    with pytest.raises(RuntimeError, match="cannot run"):
        verify(model, blocks[1:2], kept, probe_inputs(model))


class Table(nn.Module):
    """A gate for each neuron, read by all layers."""

    def __init__(self, elsewhere: bool = False, reverse: bool = False):
        super().__init__()
        self.gate = nn.Parameter(torch.randn(20))
        self.ups, self.downs = (nn.ModuleList(nn.Linear(*size) for _ in range(3)) for size in ((12, 20), (20, 12)))
        self.layers = nn.ModuleList(nn.ModuleList(pair) for pair in zip(self.ups, self.downs, strict=True))
        del self.ups, self.downs
        self.elsewhere, self.reverse = elsewhere, reverse

    def forward(self, x):
        for i, (up, down) in enumerate(self.layers):
            gate = self.gate.flip(0) if self.reverse and i == 1 else self.gate
            x = x + down(up(x).relu() * gate)
        return x * self.gate.sum() if self.elsewhere else x


X = {"x": torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0))}


def test_neurons_that_share_a_gate_are_tied():
    blocks = discover(Table(), X).blocks
    assert {block.tie for block in blocks} == {"layers.*.mlp"} and len(blocks) == 3
    assert [any(piece.tensor == "gate" for piece in block.slices) for block in blocks] == [True, False, False]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [({"elsewhere": True}, '"the model\'s output"'), ({"reverse": True}, "rows of 'gate'")],
)
def test_what_is_shared_otherwise_is_refused(settings, reason):
    discovery = discover(Table(**settings), X)
    assert not discovery.blocks
    assert len(discovery.refusals) == 3 and all(reason in one.reason for one in discovery.refusals)
