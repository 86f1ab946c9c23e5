import pytest
from hand_made import Layers, Mlp, X
from torch import nn

from hf_subprune.coverage import tiny_model
from hf_subprune.discovery.discover import discover


@pytest.mark.parametrize(
    ("model_type", "name", "reason"),
    [
        # A function is given the weights of linears.
        ("wavlm", "encoder.layers.0.attention", "is multiplied by other code"),
        # Without a GPU its attention is zero.
        ("mra", "encoder.layer.0.attention.self", "nothing in this forward depends on"),
        ("squeezebert", "encoder.layers.0.attention.query", "a convolution in 4 groups"),
    ],
)
def test_what_is_no_linear_or_does_not_run_is_refused_by_name(model_type, name, reason):
    refusals = {refusal.name: refusal for refusal in discover(tiny_model(model_type)).refusals}
    assert refusals[name].kind == "unknown" and reason in refusals[name].reason


def test_modules_that_are_never_run_are_as_those_that_are():
    class Optional(nn.Module):
        def __init__(self, runs):
            super().__init__()
            self.runs, self.mlp, self.extra = runs, Mlp(), nn.Linear(12, 12)

        def forward(self, x):
            return self.extra(self.mlp(x)) if self.runs else x

    refusals = discover(Layers(Optional(True), Optional(False)), X).refusals
    kinds = {refusal.name: refusal.kind for refusal in refusals if "does not reach it" in refusal.reason}
    assert kinds == {"layers.1.mlp": "mlp", "layers.1": "whole"}
