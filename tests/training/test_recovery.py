"""Distilling the original into the pruned model."""

import copy
import math
import sys
from dataclasses import replace

import pytest
import torch
from tiny import tiny

from hf_subprune.config import PruneConfig
from hf_subprune.data.reading import read
from hf_subprune.evaluation.drift import Drift, drift
from hf_subprune.evaluation.outputs import model_outputs
from hf_subprune.pruning import prune
from hf_subprune.training.recovery import recover

CONFIG = PruneConfig(samples=24, held_out=12, batch_size=6)


def batches(model, masked=True):
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(3, vocabulary, (36, 8), generator=generator)
    mask = torch.ones_like(ids)
    mask[::3, 5:] = 0
    return [{"input_ids": ids[i : i + 6], "attention_mask": mask[i : i + 6]} for i in range(0, 36, 6)]


def pruned(family="llama", dtype=torch.float32):
    model = tiny(family).to(dtype)
    teacher = copy.deepcopy(model)
    data = batches(model)
    worse = {"budget": "uniform", "importance": "random", "reweight": False}  # which leaves something to recover
    prune(model, data, replace(CONFIG, **worse))
    return model, teacher, data


def values(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(model, before):
    now = model.state_dict()
    return list(now) == list(before) and all(torch.equal(now[name], before[name]) for name in now)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_drift_on_held_out_samples_falls(family):
    model, teacher, data = pruned(family)
    original, parameters = values(teacher), list(model.parameters())
    recovery = recover(model, teacher, data, steps=20, learning_rate=1e-3, config=CONFIG)
    assert recovery.kept
    assert recovery.after.kl < recovery.before.kl
    assert sum(recovery.losses[-4:]) < sum(recovery.losses[:4])
    assert len(recovery.losses) == 20
    assert recovery.data["fit_samples"] == 24
    assert same(teacher, original)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert "20 steps" in str(recovery) and "<table>" in recovery._repr_html_() and len(repr(recovery)) < 80


def test_drift_of_hidden_states_falls_where_there_are_no_logits():
    model, teacher, data = pruned("mpnet")
    recovery = recover(model, teacher, data, steps=20, learning_rate=1e-3, config=CONFIG)
    assert recovery.kept and recovery.before.kl is None
    assert recovery.after.relative_error < recovery.before.relative_error


def test_the_divergence_alone_is_descended_where_each_token_has_a_distribution():
    model, teacher, data = pruned()
    config = replace(CONFIG, samples=6, held_out=6)
    batches = read(teacher, data[:2], config).fit
    expected = [drift(model, [batch], model_outputs(teacher, [batch])).kl for batch in batches]
    (loss,) = recover(model, teacher, data[:2], steps=1, config=config).losses
    assert any(loss == pytest.approx(kl, rel=1e-4) for kl in expected)


def test_low_rank_adapters_are_merged_and_leave_no_trace():
    pytest.importorskip("peft")
    model, teacher, data = pruned()
    names, parameters = list(model.state_dict()), list(model.parameters())
    embeddings = model.get_input_embeddings().weight.detach().clone()
    recovery = recover(model, teacher, data, steps=20, lora=4, config=CONFIG)
    assert recovery.kept
    assert list(model.state_dict()) == names
    assert all(a is b and b.requires_grad for a, b in zip(parameters, model.parameters(), strict=True))
    assert torch.equal(model.get_input_embeddings().weight, embeddings)
    assert not hasattr(model, "peft_config")


@pytest.mark.parametrize("lora", [None, 4])
def test_weights_are_put_back_when_it_does_not_help(lora):
    if lora:
        pytest.importorskip("peft")
    model, _, data = pruned()
    teacher = copy.deepcopy(model)  # nothing is left to learn
    before = values(model)
    recovery = recover(model, teacher, data, steps=3, learning_rate=0.1, lora=lora, config=CONFIG)
    assert not recovery.kept
    assert recovery.before.relative_error < 1e-5
    assert recovery.after.relative_error >= 0
    assert same(model, before)


def test_weights_are_put_back_when_the_loss_is_not_finite():
    model, teacher, data = pruned()
    before = values(model)
    with torch.no_grad():
        teacher.model.norm.weight[0] = math.inf
    with pytest.raises(FloatingPointError, match="The loss of step 1"):
        recover(model, teacher, data, steps=3, config=CONFIG)
    assert same(model, before)


def test_half_precision_is_trained_in_float32_and_rounded():
    model, teacher, data = pruned(dtype=torch.bfloat16)
    recovery = recover(model, teacher, data, steps=20, learning_rate=1e-3, config=CONFIG)
    assert recovery.kept
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_flags_gradients_and_the_random_state_are_left_alone():
    model, teacher, data = pruned()
    model.train()
    frozen = model.get_input_embeddings().weight.requires_grad_(False)
    before, state = frozen.detach().clone(), torch.get_rng_state()
    recover(model, teacher, data, steps=2, config=CONFIG)
    assert model.training and not frozen.requires_grad
    assert torch.equal(frozen, before)
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_the_same_seed_gives_the_same_losses():
    model, teacher, data = pruned()
    other = copy.deepcopy(model)
    first = recover(model, teacher, data, steps=6, config=CONFIG)
    assert recover(other, teacher, data, steps=6, config=CONFIG).losses == first.losses


def test_padding_has_no_part_in_the_loss():
    model, teacher, data = pruned("bert")
    garbage = [
        {**batch, "input_ids": torch.where(batch["attention_mask"].bool(), batch["input_ids"], 7)} for batch in data
    ]
    other = copy.deepcopy(model)
    first = recover(model, teacher, data, steps=4, config=CONFIG)
    second = recover(other, teacher, garbage, steps=4, config=CONFIG)
    assert second.losses == pytest.approx(first.losses, rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"steps": 0}, ValueError, "got 0 and"),
        ({"learning_rate": -1.0}, ValueError, "and -1.0"),
        ({"lora": -1}, ValueError, "`lora` is the rank of adapters.*got -1"),
        ({"steps": 2.5}, TypeError, "`steps` must be an int.*got 2.5"),
        ({"learning_rate": "1e-3"}, TypeError, "`learning_rate` a float.*'1e-3'"),
        ({"config": {"sample": 3}}, ValueError, "sample"),
    ],
)
def test_bad_arguments_are_refused(arguments, error, message):
    model = tiny("bert")
    with pytest.raises(error, match=message):
        recover(model, tiny("bert"), batches(model), **arguments)


def test_the_model_is_no_teacher_of_its_own():
    model = tiny("bert")
    with pytest.raises(ValueError, match="load the original one again"):
        recover(model, model, batches(model))


def test_a_frozen_model_is_refused():
    model = tiny("bert").requires_grad_(False)
    with pytest.raises(ValueError, match="unfreeze"):
        recover(model, tiny("bert"), batches(model))


def test_another_architecture_is_no_teacher():
    model = tiny("bert")
    before = values(model)
    with pytest.raises(ValueError, match=r"hidden_states.0 has shape \(6, 8, 96\), the model's \(6, 8, 48\)"):
        recover(model, tiny("bert", hidden_size=96), batches(model), config=CONFIG)
    assert same(model, before)


def test_adapters_without_peft_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setattr("hf_subprune.training.recovery.find_spec", lambda name: None)
    model = tiny("bert")
    with pytest.raises(ImportError, match=r"hf_subprune\[lora\]"):
        recover(model, tiny("bert"), batches(model), lora=True)


def test_the_outcome_is_the_measured_drift():
    model, teacher, data = pruned("bert")
    recovery = recover(model, teacher, data, steps=2, config=CONFIG)
    assert isinstance(recovery.before, Drift)
    assert recovery.kept == (recovery.after.kl < recovery.before.kl)
