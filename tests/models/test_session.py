import pytest
import torch
from accelerate import Accelerator
from runs_of import QUICK, assert_unchanged, snapshot
from same import assert_same_weights
from tiny import tiny
from torch.nn.utils import parametrizations, prune

import hf_subprune
from hf_subprune import PruneConfig
from hf_subprune.models.session import check_prunable

DATA = [{"input_ids": torch.randint(5, 100, (4, 9), generator=torch.Generator().manual_seed(i))} for i in range(8)]


def masked(model, layer):
    prune.l1_unstructured(layer, "weight", 0.5)


def masked_bias(model, layer):
    prune.random_unstructured(layer, "bias", 0.5)


def spectral(model, layer):
    parametrizations.spectral_norm(layer)


def normalised(model, layer):
    parametrizations.weight_norm(layer)


@pytest.mark.parametrize("adapt", [masked, masked_bias, spectral, normalised])
def test_weights_that_are_computed_anew_are_refused_by_name(adapt):
    model = tiny("bert")
    adapt(model, model.bert.encoder.layer[1].output.dense)
    said = r"weight of 'bert\.encoder\.layer\.1\.output\.dense' is computed .*prune\.remove.*remove_parametrizations"
    with pytest.raises(ValueError, match=said):
        hf_subprune.prune(model, DATA, PruneConfig(**QUICK))


def test_convolutions_of_speech_models_are_normalised_by_design():
    check_prunable(tiny("wav2vec2"))


def plain():
    model = tiny("bert")
    hf_subprune.prune(model, DATA, PruneConfig(**QUICK))
    return model


def test_the_autocast_that_accelerate_puts_around_a_forward_stays_and_does_not_count():
    model = Accelerator(mixed_precision="bf16", cpu=True).prepare_model(tiny("bert"))
    wrapped = model.forward
    hf_subprune.prune(model, DATA, PruneConfig(**QUICK))
    assert model.forward is wrapped
    assert_same_weights(model, plain())


def test_the_autocast_of_the_caller_does_not_count():
    model = tiny("bert")
    with torch.autocast("cpu", torch.bfloat16):
        hf_subprune.prune(model, DATA, PruneConfig(**QUICK))
    assert_same_weights(model, plain())


def test_another_forward_is_refused_before_the_work(monkeypatch):
    model = tiny("bert")
    run = model.forward
    model.forward = lambda **arguments: {"logits": 2 * run(**arguments).logits}
    before = snapshot(model)
    monkeypatch.setattr("hf_subprune.allocation.surveying.discover", lambda *_: pytest.fail("it began to work"))
    with pytest.raises(ValueError, match="Something besides widths was changed"):
        hf_subprune.prune(model, DATA, PruneConfig(**QUICK))
    assert_unchanged(model, before)
