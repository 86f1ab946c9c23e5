"""`prune` on architectures that do what others do not."""

import pytest
import torch

from hf_subprune import PruneConfig, prune
from hf_subprune.coverage import tiny_model
from hf_subprune.coverage.architectures import model_types
from hf_subprune.discovery.probe_inputs import probe_inputs


def noisy(inputs, seed):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: value + 0.3 * torch.randn(value.shape, generator=generator) if value.is_floating_point() else value
        for name, value in inputs.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "model_type",
    [
        "exaone4_5_vision",  # packed patches
        "hrm_text",  # rounds without gradients
        "longformer",  # moments of nearly one token only
        "mobilevitv2",  # next to no curvature
        "pegasus_x",  # a consumer is called again before its output is added
        "rt_detr",  # feature maps of several widths are read again
        "wav2vec2",  # a convolutional stem, pruned itself
    ],
)
def test_unusual_architectures_are_pruned(model_type):
    if model_type not in model_types():
        pytest.skip(f"Transformers has no {model_type} yet")
    model = tiny_model(model_type)
    inputs = probe_inputs(model)
    # No search for a config that says the widths, which takes longest; all blocks lose units as if there were one.
    layout = {"layout": "ragged", "budget": "uniform"}
    config = PruneConfig(samples=4, held_out=4, units=("mlp", "attention", "channels"), **layout)
    report = prune(model, [noisy(inputs, seed) for seed in range(4)], config)
    assert report.parameters.ratio < 0.9
    assert all(block.units_after < block.units_before for block in report.blocks)
    assert 0 < report.drift["relative_error"] < 1
