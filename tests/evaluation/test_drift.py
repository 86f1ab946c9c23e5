import pytest
import torch
from small_models import SIZES, make_batches, make_bert, make_llama
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_subprune.data import batches as batching
from hf_subprune.evaluation import outputs as evaluation
from hf_subprune.evaluation.drift import drift
from hf_subprune.evaluation.outputs import iter_outputs, model_outputs


def real(batches, outputs):
    return torch.cat([output[batch["attention_mask"].bool()] for batch, output in zip(batches, outputs, strict=True)])


def changed(make, **kwargs):
    model = make(**kwargs)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layers.1" in name or "layer.1" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


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
    monkeypatch.setattr(evaluation, "_STORED_BYTES", 2 * 6 * 30 * 4)  # six rows of 30 float32 a batch
    reference = model_outputs(model, batches)
    places = [1, 5]  # two of seven in each of three sequences, of which two end before the second place
    mask = batches[0]["attention_mask"][:, places].bool()
    with torch.no_grad():
        rows = model(**batches[0]).logits[:, places][mask]
    torch.testing.assert_close(reference[0].rows, rows)
    assert reference[0].samples.tolist() == [0, 0, 1, 2]
    assert drift(model, batches, reference).rows == 8


def test_rows_are_sampled_where_logits_of_single_places_cannot_be_asked_for(monkeypatch):
    model, batches = make_bert(), make_batches()
    monkeypatch.setattr(evaluation, "_STORED_BYTES", 2 * 5 * 16 * 4)  # five rows of 16 float32 a batch
    reference = model_outputs(model, batches)
    with torch.no_grad():
        rows = real(batches[:1], [model(**batches[0]).last_hidden_state])
    assert torch.equal(reference[0].rows, rows[[0, 3, 6, 9, 12]])
    assert reference[0].samples.tolist() == [0, 0, 0, 1, 2]


def test_many_logits_are_made_for_some_samples_at_a_time(monkeypatch):
    old, new, batches = make_llama(), changed(make_llama), make_batches()
    whole = drift(new, batches, model_outputs(old, batches))
    monkeypatch.setattr(batching, "_LOGITS_AT_ONCE", 2 * 7 * 30)  # two of three samples
    reference = model_outputs(old, batches)
    assert [len(output.rows) for output in reference] == [11, 2, 11, 2]
    parted = drift(new, batches, reference)
    assert parted.to_dict() == pytest.approx(whole.to_dict(), rel=1e-5)
    assert parted.intervals["kl"] == pytest.approx(whole.intervals["kl"], rel=1e-4)


def test_figures_come_with_intervals_over_samples():
    old, new, batches = make_llama(), changed(make_llama), make_batches()
    found = drift(new, batches, model_outputs(old, batches))
    assert set(found.intervals) == {"relative_error", "kl", "top1_agreement"}
    for name, (low, high) in found.intervals.items():
        assert 0 <= low < found.to_dict()[name] < high
    alone = [{name: value[:1] for name, value in batches[0].items()}]
    assert not drift(new, alone, model_outputs(old, alone)).intervals


def test_the_rows_that_a_reference_holds_are_compared_however_many_batches_there_are(monkeypatch):
    model, batches = make_llama(), make_batches()
    monkeypatch.setattr(evaluation, "_STORED_BYTES", 2 * 6 * 30 * 4)
    one_by_one = [output for batch in batches for output in model_outputs(model, [batch])]
    assert [len(output.rows) for output in one_by_one] == [7, 7]  # four places of seven, less padding
    change = drift(model, batches, one_by_one)
    assert change.rows == 14 and change.relative_error == 0


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


def test_outputs_of_one_number_have_no_direction():
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**SIZES, num_labels=1)).eval()
    batches = make_batches()
    assert set(drift(model, batches, model_outputs(model, batches)).to_dict()) == {"rows", "relative_error"}
