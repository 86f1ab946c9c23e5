"""What a pruned model is compared with."""

import pytest
import torch
from batches import ready_batches
from tiny import tiny

from hf_subprune import PruneConfig, prune
from hf_subprune.data.reading import read
from hf_subprune.evaluation.drift import drift
from hf_subprune.evaluation.outputs import model_outputs
from hf_subprune.solving import outcome as outcomes

CONFIG = {"samples": 8, "held_out": 4, "batch_size": 4}


@pytest.mark.parametrize("variant", ["layer", "seq", "asym", "residual"])
@pytest.mark.parametrize("family", ["bert", "llama", "t5", "vit"])
def test_the_reference_is_what_the_original_puts_out(monkeypatch, family, variant):
    model = tiny(family).eval()
    config = PruneConfig(**CONFIG, keep=0.5, variant=variant, units=("mlp",))
    batches = read(model, ready_batches(model), config).held_out
    before = model_outputs(model, batches)
    references, runs = [], []

    def reference(model, batches, rest=None):
        hook = in_the_first_layer(model).register_forward_hook(lambda *_: runs.append(1))
        references.extend(model_outputs(model, batches, rest))
        hook.remove()
        return references

    monkeypatch.setattr(outcomes, "model_outputs", reference)
    report = prune(model, ready_batches(model), config)
    for ours, expected in zip(references, before, strict=True):
        torch.testing.assert_close(ours.rows, expected.rows)
    assert bool(runs) == (variant == "seq")  # elsewhere a stream of the original has come past all layers
    assert report.drift == pytest.approx(drift(model, batches, before).to_dict(), rel=1e-4)


def in_the_first_layer(model):
    layers = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    return next(module for module in layers[0].modules() if isinstance(module, torch.nn.Linear))
