"""From the error of a block's output to the drift of the model's."""

from contextlib import contextmanager

import pytest
import torch
from batches import ready_batches
from tiny import tiny

from hf_subprune.allocation import propagation
from hf_subprune.allocation.propagation import Propagation, corrected, fill_in, spread
from hf_subprune.collection.planning import plan
from hf_subprune.config import PruneConfig
from hf_subprune.data.reading import read
from hf_subprune.discovery.discover import discover
from hf_subprune.evaluation.outputs import model_outputs
from hf_subprune.models.linears import weight_matrix
from hf_subprune.solver.curves import Trial

POINTS = ((10, 1.0), (20, 0.5), (30, 0.25), (50, 0.1), (60, 0.0))


def test_factors_are_in_equal_parts_between_the_widths_at_which_they_were_measured():
    found = corrected(POINTS, ((10, 4.0), (30, 1.0), (50, 0.5)))
    assert [width for width, _ in found] == [width for width, _ in POINTS]
    assert [loss for _, loss in found] == pytest.approx([4.0, 1.0, 0.25, 0.05, 0.0])


def test_factors_hold_beyond_the_widths_at_which_they_were_measured():
    assert [loss for _, loss in corrected(POINTS, ((20, 3.0),))] == pytest.approx([3.0, 1.5, 0.75, 0.3, 0.0])
    assert corrected(POINTS, ()) == POINTS


def test_factors_are_means_over_layers_around_the_nearer_the_more():
    blocks = discover(tiny("llama", num_hidden_layers=5)).blocks
    known = {0: 1.0, 2: 8.0, 4: 1.0}
    found = fill_in(
        blocks, {f"model.layers.{layer}.mlp": ((10, factor), (20, 2.0)) for layer, factor in known.items()}
    )
    # Weights fall off evenly, to nothing at the second one at equal distances: 4, 2, 0; 3, 3, 1; 2, 4, 2.
    means = [8 ** (1 / 3), 8 ** (3 / 7), 8 ** (1 / 2), 8 ** (3 / 7), 8 ** (1 / 3)]
    for layer, mean in enumerate(means):
        (one, first), (other, second) = found[f"model.layers.{layer}.mlp"]
        assert (one, other) == (10, 20)
        assert (first, second) == pytest.approx((mean, 2.0))
    assert all(found[f"model.layers.{layer}.self_attn"] == () for layer in range(5))


def test_factors_of_other_places_and_widths_are_not_mixed():
    blocks = [block for block in discover(tiny("t5")).blocks if block.kind == "mlp"]
    encoder, decoder = ((10, 2.0),), ((10, 32.0),)
    first, last = blocks[0].name, blocks[-1].name
    found = fill_in(blocks, {first: encoder, last: decoder})
    assert [found[block.name] for block in blocks] == [
        encoder if block.name.startswith("encoder") else decoder for block in blocks
    ]
    wider = fill_in(blocks, {first: encoder, blocks[1].name: ((10, 2.0), (20, 1.0)), last: decoder})
    assert wider[first] == encoder and len(wider[blocks[1].name]) == 2


def test_blocks_that_are_decided_on_together_are_looked_at_together():
    blocks = [block for block in discover(tiny("t5")).blocks if block.kind == "attention"]
    ties = {tie: {block.name for block in blocks if block.tie == tie} for tie in {block.tie for block in blocks}}
    assert spread(blocks, 1) == ties["encoder.block.*.layer.0.SelfAttention"]
    assert spread(blocks, 12) == {block.name for block in blocks}


@contextmanager
def counted(module):
    """The calls of a module within the context."""
    calls, run = [], module.forward

    def forward(*args, **kwargs):
        calls.append(1)
        return run(*args, **kwargs)

    module.forward = forward
    try:
        yield calls
    finally:
        del module.forward


@pytest.mark.parametrize("family", ["t5", "whisper"])
def test_trials_of_a_decoder_do_not_run_the_encoder(family):
    model = tiny(family)
    samples = read(model, ready_batches(model), PruneConfig(samples=12, held_out=4, batch_size=4))
    blocks = [block for block in discover(model, samples.probe).blocks if block.kind == "mlp"]
    trials, first = (
        Propagation(samples),
        model.get_encoder().get_submodule("block.0" if family == "t5" else "layers.0"),
    )
    for block in blocks:
        kept = torch.arange(block.units // 2)
        W = weight_matrix(model.get_submodule(block.consumer))
        trial = Trial(kept, 0.5 * W[block.columns[kept].flatten()], torch.zeros(W.shape[1]), 1.0)
        with counted(first) as calls:
            found = trials.measure([block], [trial])
        assert (len(calls) > 0) == ("encoder." in block.name), block.name
        trials._encoder, encoder = None, trials._encoder
        assert trials.measure([block], [trial]) == pytest.approx(found, rel=1e-4) != 0, block.name
        trials._encoder = encoder


@pytest.mark.parametrize("kept", [10**9, 0])
@pytest.mark.parametrize("family", ["llama", "whisper"])
def test_trials_do_not_run_what_lies_before_a_block(monkeypatch, family, kept):
    monkeypatch.setattr(propagation, "_KNOWN_BYTES", kept)  # without room for it, they do
    model = tiny(family)
    samples = read(model, ready_batches(model), PruneConfig(samples=20, held_out=4, batch_size=4))
    blocks = [block for block in discover(model, samples.probe).blocks if block.kind == "mlp"]
    trials, plainly = Propagation(samples, plan(samples, blocks).segments), Propagation(samples)
    layers = model.model.layers if family == "llama" else model.model.encoder.layers
    for block, runs_before in (blocks[0], True), (blocks[1], kept == 0):
        units = torch.arange(block.units // 2)
        W = weight_matrix(model.get_submodule(block.consumer))
        trial = Trial(units, 0.5 * W[block.columns[units].flatten()], torch.zeros(W.shape[1]), 1.0)
        with counted(layers[0]) as calls:
            found = trials.measure([block], [trial])
        assert (len(calls) > 0) == runs_before, block.name
        assert found == trials.measure([block], [trial])
        assert plainly.measure([block], [trial]) == pytest.approx(found, rel=1e-4) != 0, block.name


@pytest.mark.parametrize(
    ("family", "name", "expected"), [("vit", "pixel_values", 8), ("whisper", "input_features", 4)]
)
def test_images_are_measured_on_all_unseen_ones_and_sounds_on_a_few(family, name, expected):
    model = tiny(family)
    samples = read(model, ready_batches(model), PruneConfig(samples=20, held_out=4, batch_size=8))
    assert sum(len(batch[name]) for batch in Propagation(samples).batches) == expected


def test_blocks_that_are_left_out_give_the_drift_of_the_model_without_them():
    model = tiny("llama", num_hidden_layers=3)
    samples = read(model, ready_batches(model), PruneConfig(samples=12, held_out=4, batch_size=4))
    blocks = discover(model, samples.probe).blocks
    trials = Propagation(samples, plan(samples, blocks).segments)
    gone = [block for block in blocks if block.name in ("model.layers.1.self_attn", "model.layers.2.mlp")]
    before = [parameter.clone() for parameter in model.parameters()]
    found = [trials.without(gone[:1]), trials.without(gone)]
    assert all(torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))
    with torch.no_grad():
        expected = []
        for block in gone:  # a consumer without weights says nothing
            model.get_submodule(block.consumer).weight.zero_()
            original = torch.cat([outputs.rows for outputs in trials._reference]).double().log_softmax(-1)
            rows = [outputs.rows for outputs in model_outputs(model, trials.batches)]
            masked = torch.cat(rows).double().log_softmax(-1)
            expected.append(float((original.exp() * (original - masked)).sum(1).mean()))
    assert found == pytest.approx(expected, rel=1e-4)
