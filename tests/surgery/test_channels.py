"""Channels of convolutions: found, pruned exactly, reweighted on patches, stored."""

import pytest
import torch
from batches import ready_batches, rows
from tiny import tiny

from hf_subprune.collection.planning import plan
from hf_subprune.config import PruneConfig
from hf_subprune.data.batches import Samples
from hf_subprune.data.reading import read
from hf_subprune.discovery.discover import discover
from hf_subprune.discovery.probe_inputs import probe_inputs
from hf_subprune.models.linears import weight_matrix
from hf_subprune.models.running import floating_tensors
from hf_subprune.pruning import prune

CONFIG = {"samples": 12, "held_out": 4, "batch_size": 4, "round_to": 1, "units": ("channels",)}


def channels(family):
    model = tiny(family)
    discovery = discover(model)
    return model, [block for block in discovery.blocks if block.kind == "channels"], discovery.refusals


def test_both_inner_convolutions_of_a_bottleneck_are_consumers_and_the_stream_is_refused():
    _, blocks, refusals = channels("resnet")
    layer = "resnet.encoder.stages.0.layers.0.layer"
    inner = [block for block in blocks if block.consumer.startswith(layer)]
    assert [block.consumer for block in inner] == [f"{layer}.{i}.convolution" for i in (1, 2)]
    spatial, pointwise = inner
    assert spatial.columns.tolist() == [list(range(9 * u, 9 * u + 9)) for u in range(4)]
    assert pointwise.columns.tolist() == [[0], [1], [2], [3]]
    norm = f"{layer}.0.normalization"
    names = {piece.tensor for piece in spatial.slices}
    assert {f"{norm}.{name}" for name in ("weight", "bias", "running_mean", "running_var")} <= names
    refused = {refusal.name: refusal for refusal in refusals}
    first = refused["resnet.encoder.stages.0.layers.1.layer.0.convolution"]
    assert first.kind == "whole" and "residual stream" in first.reason and first.advice


def test_depthwise_convolutions_shrink_between_producer_and_consumer():
    _, blocks, _ = channels("mobilenet_v2")
    block = next(block for block in blocks if block.consumer == "mobilenet_v2.layer.3.reduce_1x1.convolution")
    assert any("conv_3x3.convolution.weight" in piece.tensor and piece.dim == 0 for piece in block.slices)


def test_consumers_outside_of_every_layer_are_segments_of_their_own():
    model, blocks, _ = channels("whisper")
    assert [block.consumer for block in blocks] == ["model.encoder.conv2"]
    everything = discover(model).blocks
    segments = plan(Samples.of(model, [probe_inputs(model)]), everything).segments
    assert segments[0].path == "model.encoder.conv2"
    assert segments[1].path == "model.encoder.layers.0"


def test_a_chain_of_convolutions_is_one_segment():
    model, blocks, _ = channels("wav2vec2")
    segments = plan(Samples.of(model, [probe_inputs(model)]), discover(model).blocks).segments
    assert segments[0].path == "wav2vec2.feature_extractor"
    assert [block.name for block in segments[0].blocks] == [block.name for block in blocks]
    assert [block.consumer for block in blocks] == ["wav2vec2.feature_extractor.conv_layers.1.conv"]


@pytest.mark.parametrize("family", ["resnet", "mobilenet_v2", "whisper", "wav2vec2"])
def test_pruned_channels_reload(family, tmp_path):
    model = tiny(family)
    batches = ready_batches(model)
    before = model.num_parameters()
    report = prune(model, batches, PruneConfig(**CONFIG, keep=0.5, layout="ragged"))
    assert any(block.units_after < block.units_before for block in report.blocks)
    assert model.num_parameters() < before
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    inputs = probe_inputs(tiny(family))
    with torch.no_grad():
        pairs = zip(floating_tensors(model(**inputs)), floating_tensors(again(**inputs)), strict=True)
        for one, other in pairs:
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize(("family", "variant"), [("resnet", "layer"), ("whisper", "asym")])
def test_weights_are_the_least_squares_ones_on_unfolded_inputs(family, variant):
    model, reference = tiny(family), tiny(family)
    batches = ready_batches(model, count=16)
    settings = {**CONFIG, "samples": 56, "keep": 0.5, "budget": "uniform"}
    config = PruneConfig(**settings, variant=variant, shrinkage=0.0)
    calibration = read(reference, batches, config)
    first, *others = prune(model, batches, config).blocks
    # The next block's units are rows of this consumer.
    outputs = list(others[0].kept_units) if others else slice(None)
    consumer = reference.get_submodule(first.consumer)
    inputs = rows(reference, calibration, first.consumer)
    targets = inputs @ weight_matrix(consumer).double()[:, outputs]
    if consumer.bias is not None:
        inputs, targets = inputs - inputs.mean(0), targets - targets.mean(0)
    expected = torch.linalg.lstsq(inputs[:, list(first.kept_columns)], targets, driver="gelsd").solution
    found = weight_matrix(model.get_submodule(first.consumer)).double()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
