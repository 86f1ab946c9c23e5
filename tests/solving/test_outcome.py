"""What a pruned model is compared with."""

import pytest
import torch
from batches import ready_batches
from tiny import tiny
from transformers import BertModel

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


class ReadsTwoLayers(BertModel):
    """What it puts out is the sum of what its first and its last layer do."""

    def forward(self, input_ids=None, attention_mask=None):
        seen = []
        hooks = [one.register_forward_hook(lambda _m, _a, output: seen.append(output)) for one in self.encoder.layer]
        output = super().forward(input_ids, attention_mask)
        for hook in hooks:
            hook.remove()
        first, *_, last = (states[0] if isinstance(states, tuple) else states for states in seen)
        return output.__class__(last_hidden_state=first + last)


def test_an_earlier_layer_that_is_read_in_the_end_is_not_taken_for_a_later_one():
    torch.manual_seed(0)
    model = ReadsTwoLayers(tiny("bert").config).eval()
    config = PruneConfig(**CONFIG, keep=0.5, variant="layer", units=("mlp",))
    data = [{"input_ids": batch["input_ids"]} for batch in ready_batches(model)]
    batches = read(model, data, config).held_out
    before = model_outputs(model, batches)
    report = prune(model, data, config)
    assert report.drift == pytest.approx(drift(model, batches, before).to_dict(), rel=1e-4)
