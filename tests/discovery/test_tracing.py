import pytest
import torch
from hand_made import Layers, Mlp, X
from torch import nn

from hf_subprune.discovery.discover import discover


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
