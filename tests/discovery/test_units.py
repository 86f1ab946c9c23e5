"""Decoding on traces of hand-made layers."""

import pytest
import torch
from torch import nn

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
