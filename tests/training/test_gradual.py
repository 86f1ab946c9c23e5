"""Masks, and gradual pruning without a trainer."""

import copy
from dataclasses import replace

import pytest
import torch
from tiny import tiny

from hf_subprune.blocks import groups_of
from hf_subprune.config import PruneConfig
from hf_subprune.data.reading import read
from hf_subprune.discovery.discover import discover
from hf_subprune.discovery.probe_inputs import probe_inputs
from hf_subprune.models.running import floating_tensors
from hf_subprune.solving.loop import solve
from hf_subprune.surgery.masking import Mask, mask
from hf_subprune.training.gradual import GradualPruning

CONFIG = PruneConfig(samples=16, held_out=8, batch_size=8)


def batches(model, count=3, rows=8, length=6):
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    return [{"input_ids": torch.randint(3, vocabulary, (rows, length), generator=generator)} for _ in range(count)]


def outputs(model, batch):
    with torch.no_grad():
        return torch.cat([x.flatten() for x in floating_tensors(model.eval()(**batch))])


def started(family, config=CONFIG, progress=None, **overrides):
    model = tiny(family, **overrides)
    return model, GradualPruning(model, batches(model), config, progress=progress)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_masked_units_are_zero_everywhere_and_get_no_gradient(family):
    model = tiny(family)
    block = next(b for b in discover(model, probe_inputs(model)).blocks if b.kind == "mlp")
    kept = torch.arange(0, block.units, 2)
    Mask(model, block, kept).apply()
    batch = batches(model)[0]
    sum(x.square().sum() for x in floating_tensors(model(**batch))).backward()
    removed = torch.arange(1, block.units, 2)
    for piece in block.slices:
        parameter = model.get_parameter(piece.tensor)
        rows = piece.index[removed].flatten()
        assert not parameter.index_select(piece.dim, rows).any()
        assert not parameter.grad.index_select(piece.dim, rows).any()
        assert parameter.index_select(piece.dim, piece.index[kept].flatten()).any()


def test_clearing_touches_only_removed_units():
    model = tiny("bert")
    block = next(b for b in discover(model, probe_inputs(model)).blocks if b.kind == "mlp")
    kept = torch.arange(1, block.units)
    optimizer = torch.optim.AdamW(model.parameters())
    sum(x.square().sum() for x in floating_tensors(model(**batches(model)[0]))).backward()
    optimizer.step()
    steps = {p: float(s["step"]) for p, s in optimizer.state.items()}
    Mask(model, block, kept).clear(optimizer.state)
    for piece in block.slices:
        state = optimizer.state[model.get_parameter(piece.tensor)]
        for name in ("exp_avg", "exp_avg_sq"):
            assert not state[name].index_select(piece.dim, piece.index[0]).any()
            assert state[name].index_select(piece.dim, piece.index[kept].flatten()).any()
    assert {p: float(s["step"]) for p, s in optimizer.state.items()} == steps


def test_a_mask_edit_is_undone_and_redone_exactly():
    model = tiny("gpt2")
    block = next(b for b in discover(model, probe_inputs(model)).blocks if b.kind == "mlp")
    kept = torch.tensor([0, 3, 5])
    before = copy.deepcopy(model.state_dict())
    consumer = model.get_submodule(block.consumer)
    weight = torch.randn(3, consumer.weight.shape[1])
    edit = mask(model, block, kept, weight, torch.ones(consumer.weight.shape[1]))
    after = copy.deepcopy(model.state_dict())
    assert torch.equal(consumer.weight[block.columns[kept].flatten()], weight)
    edit.undo()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    edit.redo()
    assert all(torch.equal(value, after[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("variant", ["layer", "seq", "asym", "residual"])
def test_surgery_at_the_end_changes_no_output(variant):
    config = PruneConfig(samples=16, held_out=8, batch_size=8, variant=variant)
    model, gradual = started("llama", config)
    parameters = list(model.parameters())
    assert gradual.step(0.5)
    assert gradual.step(1.0)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert gradual.kept_fraction == pytest.approx(0.5, abs=0.1)
    batch = batches(model)[0]
    masked = outputs(model, batch)
    report = gradual.finish()
    assert torch.allclose(outputs(model, batch), masked, atol=1e-5 * float(masked.abs().max()))
    assert report.parameters.after == model.num_parameters() < report.parameters.before
    assert {b.name: b.units_after for b in report.blocks} == gradual.targets


def test_kept_units_are_nested_from_step_to_step():
    _, gradual = started("bert")
    gradual.step(0.4)
    first = {name: set(kept.tolist()) for name, kept in gradual.kept.items()}
    gradual.step(0.9)
    for name, kept in gradual.kept.items():
        assert set(kept.tolist()) <= first[name]


def test_widths_are_those_of_the_model_when_it_is_first_pruned():
    config = replace(CONFIG, layout="ragged")
    model, gradual = started("bert", config)
    before = gradual.targets
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layer.0" in name and "output.dense.weight" in name:
                parameter.mul_(30)
    expected = GradualPruning(copy.deepcopy(model), batches(model), config).targets
    gradual.step(0.5)
    assert gradual.targets == expected != before
    gradual.step(1.0)
    assert gradual.targets == expected == {name: len(kept) for name, kept in gradual.kept.items()}


def test_widths_that_all_layers_have_in_common_are_chosen_once():
    chosen = []
    for silenced in ("o_proj", "down_proj"):  # units of a kind that puts out next to nothing go first
        model, gradual = started("llama")
        before = gradual.targets
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if silenced in name:
                    parameter.mul_(0.01)
        chosen.append(GradualPruning(copy.deepcopy(model), batches(model), CONFIG).targets)
        gradual.step(0.5)
        assert gradual.targets == before
    assert chosen[0] != chosen[1]


def test_tied_blocks_keep_the_same_units_all_along():
    model, gradual = started("t5", replace(CONFIG, budget="uniform"))
    tied = [group.blocks for group in groups_of(gradual.blocks) if group.share == "units" and len(group.blocks) > 1]
    assert tied
    for removed in (0.6, 1.0):
        gradual.step(removed)
        for first, *others in tied:
            assert len(gradual.kept[first.name]) < first.units
            assert all(torch.equal(gradual.kept[first.name], gradual.kept[b.name]) for b in others)
    batch = read(model, batches(model), CONFIG).fit[0]
    masked = outputs(model, batch)
    gradual.finish()
    assert torch.allclose(outputs(model, batch), masked, atol=1e-5 * float(masked.abs().max()))


def test_one_step_to_the_end_selects_and_weighs_as_prune_does():
    from hf_subprune.pruning import prune

    model, gradual = started("bert")
    gradual.finish()
    other = tiny("bert")
    report = prune(other, batches(other), CONFIG)
    assert {b.name: tuple(gradual.kept[b.name].tolist()) for b in report.blocks} == {
        b.name: b.kept_units for b in report.blocks
    }
    batch = batches(model)[0]
    assert torch.allclose(outputs(model, batch), outputs(other, batch), atol=1e-5)


def test_steps_are_in_full_precision_whatever_training_is_in(monkeypatch):
    found = []
    monkeypatch.setattr(
        "hf_subprune.training.gradual.solve",
        lambda *args, **kwargs: found.append(torch.get_float32_matmul_precision()) or solve(*args, **kwargs),
    )
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        _, gradual = started("bert")
        gradual.step(0.5)
        assert found == ["highest"] and torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_failing_step_leaves_the_model_as_it_was(monkeypatch):
    model, gradual = started("bert")
    before = copy.deepcopy(model.state_dict())
    calls = []

    def fail_later(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            raise RuntimeError("no memory")
        return mask(*args, **kwargs)

    monkeypatch.setattr("hf_subprune.training.gradual.mask", fail_later)
    with pytest.raises(RuntimeError, match="no memory"):
        gradual.step(0.5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert gradual.kept_fraction == 1


def test_a_step_that_rounds_to_nothing_changes_nothing():
    model, gradual = started("bert")
    before = copy.deepcopy(model.state_dict())
    assert not gradual.step(0.001)
    assert gradual.drift == {}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_going_on_masks_what_the_state_says():
    _, gradual = started("bert")
    gradual.step(0.5)
    other, resumed = started("bert", progress=gradual.state_dict())
    assert resumed.kept_fraction == gradual.kept_fraction
    name = gradual.blocks[1].name
    removed = sorted(set(range(gradual.blocks[1].units)) - set(gradual.kept[name].tolist()))
    assert removed
    consumer = other.get_submodule(gradual.blocks[1].consumer)
    assert not consumer.weight[:, gradual.blocks[1].columns[removed].flatten()].any()


def test_going_on_with_other_blocks_is_refused():
    _, gradual = started("bert")
    config = PruneConfig(samples=16, held_out=8, batch_size=8, units=("mlp",))
    with pytest.raises(ValueError, match="Go on with the model and the config of the run"):
        started("bert", config, gradual.state_dict())
