"""From the error of a block's output to the drift of the model's."""

import pytest
from tiny import tiny

from hf_subprune.allocation.propagation import corrected, fill_in, spread
from hf_subprune.discovery.discover import discover

POINTS = ((10, 1.0), (20, 0.5), (30, 0.25), (50, 0.1), (60, 0.0))


def test_factors_are_in_equal_parts_between_the_widths_at_which_they_were_measured():
    found = corrected(POINTS, ((10, 4.0), (30, 1.0), (50, 0.5)))
    assert [width for width, _ in found] == [width for width, _ in POINTS]
    assert [loss for _, loss in found] == pytest.approx([4.0, 1.0, 0.25, 0.05, 0.0])


def test_factors_hold_beyond_the_widths_at_which_they_were_measured():
    assert [loss for _, loss in corrected(POINTS, ((20, 3.0),))] == pytest.approx([3.0, 1.5, 0.75, 0.3, 0.0])
    assert corrected(POINTS, ()) == POINTS


def test_what_was_not_measured_takes_what_the_nearest_block_of_its_kind_has():
    blocks = discover(tiny("llama")).blocks
    first, last = ((10, 2.0),), ((10, 3.0),)
    found = fill_in(blocks, {"model.layers.0.mlp": first, "model.layers.1.mlp": (), "model.layers.2.mlp": last})
    assert [found[f"model.layers.{layer}.mlp"] for layer in range(3)] == [first, first, last]
    assert all(found[f"model.layers.{layer}.self_attn"] == () for layer in range(3))


def test_blocks_that_are_decided_on_together_are_looked_at_together():
    blocks = [block for block in discover(tiny("t5")).blocks if block.kind == "attention"]
    ties = {tie: {block.name for block in blocks if block.tie == tie} for tie in {block.tie for block in blocks}}
    assert spread(blocks, 1) == ties["encoder.block.*.layer.0.SelfAttention"]
    assert spread(blocks, 12) == {block.name for block in blocks}
