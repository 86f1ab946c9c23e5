import pytest
import torch
from batches import ready_batches
from tiny import tiny
from transformers import AutoModelForCausalLM

from hf_subprune import PruneConfig, prune
from hf_subprune.allocation import losses
from hf_subprune.allocation.propagation import Propagation
from hf_subprune.allocation.surveying import take_survey
from hf_subprune.data.reading import read
from hf_subprune.runs.workspace import Workspace

QUICK = {"samples": 12, "held_out": 4, "batch_size": 4, "layout": "ragged"}


def widths(report):
    return [block.units_after for block in report.blocks]


def test_labels_decide_equal_loss_when_an_evaluation_is_given():
    model = tiny("bert")
    calls = []

    def evaluation(candidate):
        """Only the last block matters to this user."""
        calls.append(1)
        mlp = candidate.bert.encoder.layer[-1].intermediate.dense.weight
        return -float(56 - mlp.shape[0])

    config = PruneConfig(**QUICK, keep=0.5, budget="equal_loss", units=("mlp",))
    report = prune(model, ready_batches(model), config, evaluation=evaluation)
    assert len(calls) == 1 + 2 * len(report.blocks)
    assert widths(report)[-1] > 2 * max(widths(report)[:-1])
    with pytest.raises(ValueError, match="equal_loss"):
        prune(tiny("bert"), ready_batches(model), PruneConfig(**QUICK), evaluation=evaluation)


@pytest.mark.parametrize("variant", ["asym", "residual"])
@pytest.mark.parametrize(("family", "layer"), [("llama", "model.layers.1"), ("bart", "model.decoder.layers.0")])
def test_the_original_does_not_run_again_where_what_it_puts_out_is_kept(monkeypatch, family, layer, variant):
    def pruned():
        model, calls = tiny(family).eval(), []
        model.get_submodule(layer).register_forward_pre_hook(lambda *_: calls.append(1))
        prune(model, ready_batches(model), PruneConfig(**QUICK, keep=0.6, variant=variant))
        return model, len(calls)

    model, calls = pruned()
    monkeypatch.setattr(losses, "_TARGET_BYTES", 0)
    expected, more = pruned()
    assert calls < more
    wanted = dict(expected.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, wanted[name], rtol=1e-3, atol=1e-5)


def test_a_sublayer_that_says_next_to_nothing_is_left_out(tmp_path):
    model = tiny("llama", num_hidden_layers=3)
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.mul_(1e-3)
    batches = ready_batches(model)
    config = PruneConfig(**QUICK, keep=0.85, budget="global")
    report = prune(model, batches, config)
    gone = {block.name: block for block in report.blocks if block.units_after == 0}
    assert list(gone) == ["model.layers.1.self_attn"]
    assert gone["model.layers.1.self_attn"].predicted[0][0] == 0
    assert report.allocation.reached <= report.allocation.limit
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**batches[0]).logits, model(**batches[0]).logits)
    prompt = batches[0]["input_ids"][:1, :4]
    tokens = [again.generate(prompt, max_new_tokens=4, do_sample=False, use_cache=cached) for cached in (True, False)]
    assert torch.equal(*tokens)


@pytest.mark.parametrize(("breaks", "found"), [(4, (1.0, 9.0 - 1.0, 216.0 - 9.0)), (2, (1.0,))])
def test_blocks_that_are_missed_more_together_than_alone_do_not_go_together(monkeypatch, breaks, found):
    model = tiny("llama", num_hidden_layers=3)
    samples = read(model, ready_batches(model), PruneConfig(**QUICK))
    known = {"model.layers.0.self_attn": 1.0, "model.layers.1.self_attn": 2.0, "model.layers.2.self_attn": 3.0}

    def without(_, blocks):
        return sum(known[block.name] for block in blocks) ** len(blocks) if len(blocks) < breaks else float("nan")

    monkeypatch.setattr(Propagation, "without", without)
    config = PruneConfig(**QUICK, units=("attention",), budget="global")
    survey = take_survey(samples, [config], None, Workspace())
    lost = {name: points[0][1] for name, points in survey.losses.items() if points[0][0] == 0}
    assert lost == pytest.approx({name: losses._MENDED * loss for name, loss in zip(known, found, strict=False)})
