import pytest
import torch
from tiny import tiny
from torch import nn

from hf_subprune.discovery.probe_inputs import probe_inputs
from hf_subprune.models.running import floating_tensors


def test_inputs_that_cannot_be_made_are_asked_for():
    class Odd(nn.Module):
        main_input_name = "measurements"
        config = tiny("bert").config

        def forward(self, measurements):
            return measurements

    with pytest.raises(ValueError, match=r"measurements.*Pass `inputs`"):
        probe_inputs(Odd())


@pytest.mark.parametrize("family", ["bert", "vit", "clip", "whisper", "t5", "wav2vec2"])
def test_probe_inputs_run(family):
    model = tiny(family)
    inputs = probe_inputs(model)
    assert all(len(value) == 2 for value in inputs.values())
    with torch.no_grad():
        outputs = list(floating_tensors(model(**inputs)))
    assert outputs and all(output.isfinite().all() for output in outputs)
