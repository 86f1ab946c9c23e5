"""Running statistics of batch norms after channels have gone."""

import copy

import pytest
import torch
from batches import ready_batches
from same import assert_same_weights
from tiny import tiny
from torch.nn.modules.batchnorm import _BatchNorm

from hf_subprune import PruneConfig, prune, prune_sizes

CONFIG = PruneConfig(
    keep=0.5, units=("channels",), samples=20, held_out=4, batch_size=4, round_to=1, reweight=False, layout="ragged"
)


def norms(model):
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


@pytest.fixture
def trained():
    """A ResNet whose norms know what they read, and batches of the same kind."""
    model = tiny("resnet", seed=2)
    batches = ready_batches(model)
    for norm in norms(model):
        norm.momentum = None
    with torch.no_grad():
        for batch in batches:
            model.train()(**batch)
    return model.eval(), batches


def test_statistics_are_those_of_what_norms_read_once_channels_have_gone(trained):
    model, batches = trained
    report = prune(model, batches, CONFIG)
    assert report.renewed_norms == len(norms(model)) and "batch norms are those of the samples" in str(report)
    assert all(norm.momentum is None and not norm.training for norm in norms(model))
    expected = copy.deepcopy(model)
    for norm in norms(expected):
        norm.reset_running_stats()
        norm.train()
    with torch.no_grad():
        for batch in batches[:5]:
            expected(**batch)
    for norm, other in zip(norms(model), norms(expected), strict=True):
        torch.testing.assert_close(norm.running_mean, other.running_mean)
        torch.testing.assert_close(norm.running_var, other.running_var)


def test_the_drift_that_is_reported_is_less_with_them(trained, monkeypatch):
    model, batches = trained
    report = prune(copy.deepcopy(model), batches, CONFIG)
    monkeypatch.setattr("hf_subprune.solving.norms._norms", lambda _: [])
    assert report.drift["kl"] < prune(model, batches, CONFIG).drift["kl"]


def test_statistics_that_do_not_help_are_put_back():
    model = tiny("resnet")  # its norms never read anything: what they would find is not what the original computes
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert prune(model, ready_batches(model), CONFIG).renewed_norms == 0
    same = [torch.equal(buffer, before[name]) for name, buffer in model.named_buffers() if buffer.ndim == 0]
    assert same and all(same)
    assert all(not norm.running_mean.any() and (norm.running_var == 1).all() for norm in norms(model))


def test_sizes_give_the_original_its_statistics_back(trained):
    model, batches = trained
    before = copy.deepcopy(model)
    assert [report.renewed_norms > 0 for report in prune_sizes(model, batches, [CONFIG, CONFIG])] == [True] * 2
    assert_same_weights(model, before)


def test_a_batch_of_one_sample_has_no_statistics(trained):
    model, batches = trained
    assert prune(model, batches, PruneConfig(**{**CONFIG.to_dict(), "batch_size": 1})).renewed_norms == 0
