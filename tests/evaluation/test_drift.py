import math
import time
from contextlib import contextmanager

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

from hf_subprune.evaluation import drift as evaluation
from hf_subprune.evaluation.costs import (
    circumstances,
    count_macs,
    count_parameters,
    measure_in_turn,
    measure_latency,
    times_in_turn,
)
from hf_subprune.evaluation.drift import drift, iter_outputs, model_outputs
from hf_subprune.evaluation.scores import embed, log_losses, neighbour_agreement, perplexity, predicted_classes

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def make_bert(cls=BertModel, **kwargs):
    torch.manual_seed(0)
    return cls(BertConfig(vocab_size=30, **SIZES, **kwargs)).eval()


def make_llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=30, num_key_value_heads=1, **SIZES)).eval()


def make_batches(count=2, length=7):
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(count):
        mask = torch.ones(3, length, dtype=torch.long)
        mask[1, 4:] = 0
        mask[2, 2:] = 0
        batches.append({"input_ids": torch.randint(3, 30, (3, length), generator=generator), "attention_mask": mask})
    return batches


def real(batches, outputs):
    return torch.cat([output[batch["attention_mask"].bool()] for batch, output in zip(batches, outputs, strict=True)])


def changed(make, **kwargs):
    model = make(**kwargs)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layers.1" in name or "layer.1" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


# Cost


def test_tied_parameters_count_once():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=30, n_positions=8, n_embd=16, n_layer=1, n_head=2))
    assert count_parameters(model) == sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())
    assert model.lm_head.weight is model.transformer.wte.weight


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("masked", [False, True])
def test_macs_are_those_of_one_sample(attention, masked):
    model = make_bert(attn_implementation=attention)
    batch = make_batches(1, length=7)[0]
    if not masked:
        del batch["attention_mask"]
    projections, feed_forward, scores = 4 * 7 * 16 * 16, 2 * 7 * 16 * 24, 2 * 7 * 7 * 16
    pooler = 16 * 16
    assert count_macs(model, batch) == 2 * (projections + feed_forward + scores) + pooler


def test_macs_of_grouped_heads_do_not_depend_on_the_implementation():
    model, batch = make_llama(), make_batches(1)[0]
    fused = count_macs(model, batch)
    model.set_attn_implementation("eager")
    assert fused == count_macs(model, batch) > 0


def test_batches_that_cannot_be_cut_are_counted_whole():
    model, batch = make_bert(), make_batches(1)[0]
    one = count_macs(model, batch)
    assert count_macs(model, {**batch, "position_ids": torch.arange(7)[None]}) == 3 * one


def test_latency_is_in_seconds_and_depends_on_what_is_said():
    model, batch = make_bert(), make_batches(1)[0]
    assert 0 < measure_latency(model, batch, min_run_time=0.01) < 1
    expected = {"batch_size": 3, "length": 7, "device": "cpu", "dtype": "float32", "threads": torch.get_num_threads()}
    assert circumstances(model, batch) == expected


def test_a_changed_model_is_timed_in_turn_with_itself():
    model, order, now = make_bert(), [], ["outside"]
    model.register_forward_hook(lambda *_: order.append(now[-1]))

    @contextmanager
    def changed():
        now.append("inside")
        model.register_forward_hook(lambda *_: time.sleep(0.02))
        yield
        now.pop()
        model._forward_hooks.popitem()

    outside, inside = times_in_turn(model, make_batches(1)[0], changed, min_run_time=0.0)
    assert order == ["outside", "inside"] * 4  # the first turn warms up
    assert inside >= outside + 0.01


def test_models_are_timed_in_turn():
    order = []
    models = [make_bert(), make_bert()]
    for i, model in enumerate(models):
        model.register_forward_hook(lambda *_, i=i: order.append(i))
    times = measure_in_turn(models, make_batches(1)[0], rounds=2)
    assert order == [0, 1] * 3  # the first round warms up
    assert [len(row) for row in times] == [2, 2] and all(0 < t < 1 for row in times for t in row)


def test_images_have_no_length():
    model = ViTModel(ViTConfig(image_size=16, patch_size=8, **SIZES)).eval()
    batch = {"pixel_values": torch.zeros(2, 3, 16, 16)}
    assert circumstances(model, batch)["length"] is None
    assert count_macs(model, batch) > 0


def test_measuring_changes_nothing():
    model, batch = make_bert().train(), make_batches(1)[0]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    count_macs(model, batch)
    measure_latency(model, batch, min_run_time=0.01)
    model_outputs(model, [batch])
    assert model.training
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# Drift


@pytest.mark.parametrize("make", [make_bert, make_llama])
def test_a_model_does_not_drift_from_itself(make):
    model, batches = make(), make_batches()
    found = drift(model, batches, model_outputs(model, batches))
    assert found.relative_error == 0
    assert found.rows == 2 * (7 + 4 + 2)
    if make is make_llama:
        assert (found.kl, found.top1_agreement) == (0, 1)
        assert set(found.to_dict()) == {"rows", "relative_error", "kl", "top1_agreement"}
    else:
        assert found.cosine == pytest.approx(1)
        assert set(found.to_dict()) == {"rows", "relative_error", "cosine", "embedding_cosine"}


def test_drift_of_logits_is_what_it_says():
    old, new, batches = make_llama(), changed(make_llama), make_batches()
    with torch.no_grad():
        a, b = (real(batches, [model(**batch).logits for batch in batches]).double() for model in (old, new))
    found = drift(new, batches, model_outputs(old, batches))
    p, q = a.softmax(1), b.softmax(1)
    assert found.kl == pytest.approx(float((p * (p / q).log()).sum(1).mean()), rel=1e-5)
    assert found.kl > 1e-6
    assert found.top1_agreement == pytest.approx(float((a.argmax(1) == b.argmax(1)).double().mean()))
    assert found.relative_error == pytest.approx(float((b - a).norm() / a.norm()), rel=1e-5)
    assert found == drift(new, batches, iter_outputs(old, batches))


def test_drift_of_hidden_states_is_what_it_says():
    old, new, batches = make_bert(), changed(make_bert), make_batches()
    with torch.no_grad():
        hidden = [[model(**batch).last_hidden_state for batch in batches] for model in (old, new)]
    a, b = (real(batches, outputs) for outputs in hidden)
    means = [
        torch.stack([row[mask.bool()].mean(0) for batch, output in zip(batches, outputs, strict=True)
                     for row, mask in zip(output, batch["attention_mask"], strict=True)])
        for outputs in hidden
    ]  # fmt: skip
    found = drift(new, batches, model_outputs(old, batches))
    assert found.cosine == pytest.approx(float(torch.cosine_similarity(a, b).mean()), rel=1e-5)
    assert found.cosine < 0.9999
    assert found.relative_error == pytest.approx(float((b - a).norm() / a.norm()), rel=1e-5)
    assert found.embedding_cosine == pytest.approx(float(torch.cosine_similarity(*means).mean()), rel=1e-5)


def test_a_classifier_drifts_by_sample_and_a_regressor_has_no_divergence():
    batches = make_batches()
    classifier = make_bert(BertForSequenceClassification, num_labels=4)
    assert drift(classifier, batches, model_outputs(classifier, batches)).to_dict() == {
        "rows": 6, "relative_error": 0, "kl": 0, "top1_agreement": 1,
    }  # fmt: skip
    regressor = make_bert(BertForSequenceClassification, num_labels=1)
    other = changed(make_bert, cls=BertForSequenceClassification, num_labels=1)
    found = drift(other, batches, model_outputs(regressor, batches))
    assert found.kl is None
    assert found.relative_error > 0


def test_decoders_are_compared_on_their_own_tokens():
    model = T5ForConditionalGeneration(T5Config(vocab_size=30, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2))
    batch = {
        "input_ids": torch.full((1, 4), 3),
        "attention_mask": torch.tensor([[1, 1, 1, 1]]),
        "decoder_input_ids": torch.full((1, 4), 3),
        "decoder_attention_mask": torch.tensor([[1, 1, 0, 0]]),
    }
    assert drift(model, [batch], model_outputs(model, [batch])).rows == 2


def test_nested_outputs_are_found_and_none_is_an_error():
    tensor = torch.ones(2, 3)
    assert evaluation.compared_output({"feature_maps": (torch.arange(2), tensor)}) == ("hidden", tensor)
    with pytest.raises(ValueError, match="no floating-point tensor to compare, found: boxes"):
        evaluation.compared_output({"boxes": torch.arange(2)})


def test_large_outputs_are_sampled_evenly(monkeypatch):
    model, batches = make_llama(), make_batches()
    monkeypatch.setattr(evaluation, "_STORED_BYTES", 2 * 5 * 30 * 4)  # five rows of 30 float32 a batch
    reference = model_outputs(model, batches)
    assert [output.rows.shape for output in reference] == [(5, 30), (5, 30)]
    with torch.no_grad():
        rows = real(batches[:1], [model(**batches[0]).logits])
    assert torch.equal(reference[0].rows, rows[[0, 3, 6, 9, 12]])
    assert drift(model, batches, reference).rows == 10


def test_the_rows_that_a_reference_holds_are_compared_however_many_batches_there_are(monkeypatch):
    model, batches = make_llama(), make_batches()
    monkeypatch.setattr(evaluation, "_STORED_BYTES", 2 * 5 * 30 * 4)
    one_by_one = [output for batch in batches for output in model_outputs(model, [batch])]
    assert [len(output.rows) for output in one_by_one] == [10, 10]
    change = drift(model, batches, one_by_one)
    assert change.rows == 20 and change.relative_error == 0


def test_outputs_that_do_not_match_are_refused_with_their_shapes():
    batches = make_batches(1)
    reference = model_outputs(make_bert(), batches)
    with pytest.raises(ValueError, match=r"gives hidden of shape \(13, 16\) .* other model logits of shape \(3, 5\)"):
        drift(make_bert(BertForSequenceClassification, num_labels=5), batches, reference)
    torch.manual_seed(0)
    wide = BertModel(BertConfig(vocab_size=30, **{**SIZES, "hidden_size": 18})).eval()
    with pytest.raises(ValueError, match=r"hidden of shape \(13, 16\) .* hidden of shape \(13, 18\)"):
        drift(wide, batches, reference)


def test_drift_needs_as_many_batches_as_references():
    model, batches = make_llama(), make_batches()
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        drift(model, batches[:1], model_outputs(model, batches))
    with pytest.raises(ValueError, match="at least one batch"):
        drift(model, [], [])
    masked = [{**batch, "attention_mask": torch.zeros_like(batch["attention_mask"])} for batch in batches]
    with pytest.raises(ValueError, match="no real token to compare on"):
        drift(model, masked, model_outputs(model, masked))


# Quality


def test_embeddings_do_not_depend_on_padding():
    batches = make_batches(1)
    for model in (make_bert(), make_bert(BertForSequenceClassification).eval()):
        together = embed(model, batches)
        assert torch.allclose(together.norm(dim=1), torch.ones(3))
        alone = [
            embed(model, [{"input_ids": ids[None, : int(mask.sum())]}])
            for ids, mask in zip(batches[0]["input_ids"], batches[0]["attention_mask"], strict=True)
        ]
        assert torch.allclose(together, torch.cat(alone), atol=1e-5)


def test_neighbours():
    line = torch.tensor([[0.0, 1.0], [0.1, 1.0], [1.0, 0.0], [1.0, 0.1]])
    line = torch.nn.functional.normalize(line, dim=1)
    assert neighbour_agreement(line, line) == 1
    assert neighbour_agreement(line, line[[0, 2, 1, 3]]) == 0


def test_perplexity_ignores_padding_and_the_first_token():
    model, batches = make_llama(), make_batches()
    losses = []
    for batch in batches:
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            ids = ids[: int(mask.sum())]
            with torch.no_grad():
                log_p = model(ids[None]).logits[0].log_softmax(-1)
            losses += [-float(log_p[i, ids[i + 1]]) for i in range(len(ids) - 1)]
    assert perplexity(model, batches) == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)


def test_log_losses_are_those_of_single_samples():
    model, batches = make_llama(), make_batches()
    losses = log_losses(model, batches)
    assert losses[:, 1].tolist() == [6, 3, 1] * 2
    alone = log_losses(model, [{"input_ids": batches[0]["input_ids"][1:2, :4]}])
    assert torch.allclose(losses[1], alone[0], rtol=1e-5)
    with pytest.raises(ValueError, match="causal language model, which BertModel is not"):
        log_losses(make_bert(), batches)


def test_predicted_classes_are_in_the_order_of_the_samples():
    model, batches = make_bert(BertForSequenceClassification, num_labels=4), make_batches()
    with torch.no_grad():
        expected = torch.cat([model(**batch).logits.argmax(1) for batch in batches])
    assert torch.equal(predicted_classes(model, batches), expected)
    with pytest.raises(ValueError, match="BertModel gives no logits"):
        predicted_classes(make_bert(), batches)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM gives logits of shape \(3, 7, 30\)"):
        predicted_classes(make_llama(), batches)
