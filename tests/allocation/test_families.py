"""Which blocks get one width in common, and that what they get is what the config of the model says."""

import re

import pytest
import torch
from batches import ready_batches
from runs_of import QUICK, assert_unchanged, snapshot
from same import assert_same_weights
from tiny import tiny
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from hf_subprune import PruneConfig, prune
from hf_subprune.allocation import losses
from hf_subprune.allocation.families import Families, even_families, loads_as_stock
from hf_subprune.discovery.discover import discover
from hf_subprune.discovery.probe_inputs import probe_inputs
from hf_subprune.models.session import session
from hf_subprune.solver.curves import loss_curve


def found(model):
    """Its blocks and families."""
    probe = probe_inputs(model)
    with session(model):
        blocks = discover(model, probe).blocks
        return blocks, even_families(model, blocks)


def places(blocks, families):
    """Of each family that does not stay whole, the kind of its blocks and where they are, `*` for numbers."""
    parts = [family for family in families.of(blocks) if family[0].name not in families.whole]
    return [(family[0].kind, {re.sub(r"\d+", "*", block.name) for block in family}) for family in parts]


def test_all_layers_of_a_decoder_are_one_family_a_kind():
    model = tiny("llama")
    blocks, families = found(model)
    assert families.even and not families.whole
    assert places(blocks, families) == [("attention", {"model.layers.*.self_attn"}), ("mlp", {"model.layers.*.mlp"})]
    assert [len(family) for family in families.names] == [2, 2]


@pytest.mark.parametrize("same", [True, False])
def test_encoder_and_decoder_are_families_of_their_own_where_the_config_has_a_number_for_each(same):
    model = tiny("whisper", **({"decoder_ffn_dim": 56} if same else {}))
    blocks, families = found(model)
    layers = [{"model.encoder.layers.*.mlp"}, {"model.decoder.layers.*.mlp"}]
    assert places(blocks, families) == [("mlp", stack) for stack in layers]
    assert all(block.name in families.whole for block in blocks if block.kind == "attention")


def test_encoder_and_decoder_are_one_family_where_the_config_has_one_number():
    model = tiny("t5")
    blocks, families = found(model)
    assert not families.whole
    both, attention = sorted(places(blocks, families), reverse=True)
    assert both == ("mlp", {f"{stack}.block.*.layer.*.DenseReluDense" for stack in ("encoder", "decoder")})
    assert attention[0] == "attention" and len(attention[1]) == 3


def test_what_the_config_has_no_number_for_stays_whole():
    blocks, families = found(tiny("bert"))
    assert places(blocks, families) == [("mlp", {"bert.encoder.layer.*.mlp"})]
    assert families.whole == {block.name for block in blocks if block.kind == "attention"}
    assert all((name,) in families.names for name in families.whole)


def test_part_of_the_layers_is_no_family():
    model = tiny("bert")
    probe = probe_inputs(model)
    with session(model):
        blocks = [block for block in discover(model, probe).blocks if ".0." not in block.name]
        assert even_families(model, blocks).whole == {block.name for block in blocks}


def test_trials_leave_the_model_as_it_was():
    model = tiny("t5")
    before = snapshot(model)
    blocks, _ = found(model)
    with session(model):
        mlps = [block for block in blocks if block.kind == "mlp"]
        assert loads_as_stock(model, mlps, {block.name: 7 for block in mlps}, probe_inputs(model))
        assert not loads_as_stock(model, mlps[1:], {block.name: 7 for block in mlps[1:]}, probe_inputs(model))
    assert_unchanged(model, before)


def test_blocks_have_widths_of_their_own_but_for_those_that_share_units():
    blocks = discover(tiny("mpnet")).blocks
    families = Families.single(blocks)
    assert sorted(map(len, families.names)) == [1, 1, 2]
    assert not families.even and not families.whole
    assert [len(family) for family in families.of(blocks[:2])] == [1, 1]


def test_by_default_an_encoder_loses_neurons_only_and_loads_without_the_package(tmp_path):
    model = tiny("bert")
    batches = ready_batches(model)
    report = prune(model, batches, PruneConfig(**QUICK, keep=0.8))
    assert report.layout == "stock"
    assert {block.units_after for block in report.blocks if block.kind == "attention"} == {4}
    (width,) = {block.units_after for block in report.blocks if block.kind == "mlp"}
    assert width < 56
    model.save_pretrained(tmp_path)
    assert "subprune" not in (tmp_path / "config.json").read_text()
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert again.config.intermediate_size == width
    assert_same_weights(again, model)
    with torch.no_grad():
        torch.testing.assert_close(again(**batches[0]).logits, model(**batches[0]).logits)


def test_by_default_layers_differ_only_where_alike_they_cannot_be_that_small(computed):
    model = tiny("bert")  # most parameters are those of heads, of which its config cannot say fewer
    report = prune(model, ready_batches(model), PruneConfig(**QUICK, keep=0.5))
    assert report.layout == "ragged"
    assert any(block.units_after < block.units_before for block in report.blocks if block.kind == "attention")
    computed.start_anew()
    with pytest.raises(ValueError, match="layout='stock' is not possible"):
        prune(tiny("bert"), ready_batches(model), PruneConfig(**QUICK, keep=0.5, layout="stock"))
    assert computed.names == ["blocks"]


@pytest.mark.parametrize("keep", [0.5, 0.7])
def test_by_default_what_is_kept_is_shared_out_between_kinds(keep):
    model = tiny("llama", intermediate_size=200)
    report = prune(model, ready_batches(model), PruneConfig(**QUICK, keep=keep))
    assert (report.layout, report.allocation.budget) == ("stock", "global")
    for kind in ("mlp", "attention"):
        assert len({(block.units_before, block.units_after) for block in report.blocks if block.kind == kind}) == 1
    assert 0.99 * report.allocation.limit <= report.allocation.reached <= report.allocation.limit


@pytest.mark.parametrize("budget", ["auto", "uniform"])
def test_a_sublayer_that_is_asked_to_go_is_gone_and_the_rest_shares_what_is_left(budget):
    model = tiny("llama")
    report = prune(
        model, ready_batches(model), PruneConfig(**QUICK, keep=0.7, remove=("*.1.self_attn",), budget=budget)
    )
    (gone,) = [b for b in report.blocks if b.name == "model.layers.1.self_attn"]
    assert gone.units_after == 0 and gone.kept_units == ()
    assert report.layout == "ragged"
    assert 0.9 * report.allocation.limit < report.allocation.reached <= report.allocation.limit


@pytest.mark.parametrize(("keep", "gone"), [(0.3, "model.layers.1.self_attn"), (0.2, "model.layers.1.mlp")])
def test_a_size_is_reached_without_a_sublayer_as_with_it(keep, gone):
    model = tiny("llama", intermediate_size=200)
    report = prune(model, ready_batches(model), PruneConfig(**QUICK, keep=keep, remove=(gone,)))
    assert report.parameters.after == model.num_parameters()
    assert 0.8 * report.allocation.limit < report.allocation.reached <= report.allocation.limit


def test_a_whole_layer_that_goes_leaves_a_stock_model(tmp_path):
    model = tiny("llama")
    batches = ready_batches(model)
    report = prune(model, batches, PruneConfig(**QUICK, keep=1.0, remove=("model.layers.1.*",)))
    assert report.layout == "stock"
    assert model.config.num_hidden_layers == 1
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**batches[0]).logits, model(**batches[0]).logits)


def test_what_cannot_go_is_named():
    model = tiny("resnet")
    with pytest.raises(ValueError, match=r"`remove` names .*, which must keep a unit"):
        prune(model, ready_batches(model), PruneConfig(**QUICK, units=("channels",), remove=("*",)))


@pytest.mark.parametrize(("units", "choice"), [(("mlp",), False), (("mlp", "attention"), True)])
def test_curves_are_made_where_a_size_leaves_a_choice(monkeypatch, units, choice):
    looked = []
    monkeypatch.setattr(losses, "loss_curve", lambda *args, **kwargs: looked.append(1) or loss_curve(*args, **kwargs))
    model = tiny("llama")
    report = prune(model, ready_batches(model), PruneConfig(keep=0.7, units=units, samples=6, held_out=2))
    assert bool(looked) == choice
    assert (report.allocation.predicted_drift is not None) == choice
    assert report.layout == "stock"
