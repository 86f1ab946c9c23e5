"""Whether two models are the same.

Their weights are, to the last bit. What they compute is up to rounding (`torch.testing.assert_close`): on some
processors a product rounds differently with where in memory the same numbers begin, and those that were loaded begin
where they do in their file.
"""

import torch
from torch import nn


def assert_same_weights(found: nn.Module, expected: nn.Module) -> None:
    """Parameters and buffers that are saved have the same names, types and bits."""
    mine, theirs = found.state_dict(), expected.state_dict()
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        assert mine[name].dtype == value.dtype and torch.equal(mine[name], value), name
