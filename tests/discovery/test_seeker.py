import copy

import pytest
from hand_made import Layers, Mlp, Normalized, X
from torch import nn

from hf_subprune.coverage import tiny_model
from hf_subprune.discovery.discover import discover


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


def test_a_single_head_is_refused():
    refusals = discover(tiny_model("segformer")).refusals
    assert any(one.kind == "whole" and "single head" in one.reason for one in refusals)


def test_features_that_two_linears_read_alike_are_a_stream():
    refusals = {refusal.name: refusal for refusal in discover(tiny_model("mobilebert")).refusals}
    query = refusals["encoder.layer.0.attention.self.query"]
    assert query.kind == "whole" and "bottleneck.attention.dense" in query.reason
