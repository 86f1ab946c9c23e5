"""Decoding on traces of hand-made layers."""

import pytest
import torch
from hand_made import Layers
from tiny import tiny
from torch import nn

from hf_subprune.discovery.discover import discover
from hf_subprune.discovery.tracing import traced
from hf_subprune.discovery.units import Jacobian, decode


@pytest.fixture
def taken(monkeypatch) -> list[set[str]]:
    """Names of the sources that each vector-Jacobian product is taken with."""
    names = []
    plain = Jacobian._products

    def counted(self, cotangent):
        names.append({source.name for source in self.sources})
        return plain(self, cotangent)

    monkeypatch.setattr(Jacobian, "_products", counted)
    return names


def decoded(between: nn.Module):
    """Units of the second of two linears with something between them."""
    model = nn.Sequential(nn.Linear(6, 16), between, nn.Linear(16, 6))
    with traced(model, {"input": torch.randn(4, 6)}) as trace:
        (read, sources) = next(pair for pair in zip(trace.reads, trace.sources, strict=True) if pair[0].reader == "2")
        return decode(Jacobian(read.tensor, sources))


def test_two_products_with_linears_alone_tell_that_a_norm_spans_the_width(taken):
    assert decoded(nn.LayerNorm(16)) is None
    assert taken == [{"0"}, {"0"}]  # none with the norm's weights, or with embeddings of any size


def test_a_column_is_a_unit_with_the_row_and_the_entry_between(taken):
    units = decoded(nn.PReLU(16, init=0.2))
    assert units.columns.flatten().tolist() == list(range(16))
    assert units.owner.tolist() == [*range(16), *range(16)]
    assert taken[-1] == {"0", "1.weight"}


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
