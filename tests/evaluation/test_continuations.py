import pytest
import torch
from batches import ready_batches
from command_line import save_encoder
from tiny import tiny
from transformers import AutoTokenizer

from hf_subprune import PruneConfig, PruneReport, prune
from hf_subprune.data.batches import Samples
from hf_subprune.evaluation.continuations import beginnings, continued, side_by_side


@pytest.fixture
def tokenizer(tmp_path):
    return AutoTokenizer.from_pretrained(save_encoder(tmp_path / "model"))


def samples_of(model, tokenizer):
    return Samples(ready_batches(model), [], 1, 0, source="", model=model, tokenizer=tokenizer)


def test_a_language_model_continues_texts_and_is_left_as_it_is(tokenizer):
    model = tiny("llama")
    begun = beginnings(samples_of(model, tokenizer))
    assert begun.ndim == 2 and begun.dtype == torch.int64
    before, config = {name: p.clone() for name, p in model.named_parameters()}, model.generation_config.to_dict()
    new = continued(model, begun)
    assert new.shape == (len(begun), 24)
    assert torch.equal(model(begun).logits[:, -1].argmax(1), new[:, 0])
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert model.generation_config.to_dict() == config
    first, *_ = side_by_side(tokenizer, begun, new, new)
    assert first.before == first.after


@pytest.mark.parametrize("family", ["bert", "t5", "vit"])
def test_models_that_do_not_go_on_with_text_continue_none(family, tokenizer):
    assert beginnings(samples_of(tiny(family), tokenizer)) is None
    assert continued(tiny(family), None) is None


def test_without_a_tokenizer_there_is_nothing_to_read():
    assert beginnings(samples_of(tiny("llama"), None)) is None
    assert side_by_side(None, None, None, None) == ()


def test_a_model_whose_generation_fails_is_pruned_all_the_same(tokenizer, monkeypatch):
    model = tiny("llama")
    begun = beginnings(samples_of(model, tokenizer))
    monkeypatch.setattr(type(model), "generate", lambda *args, **kwargs: {}[0])
    assert continued(model, begun) is None


def test_the_report_shows_how_both_models_go_on(tokenizer, tmp_path):
    model = tiny("llama")
    texts = ["the cat sat on a mat while two dogs ran", "nobody saw it and two dogs ran past the cat"] * 6
    report = prune(model, texts, PruneConfig(samples=8, held_out=4, batch_size=4, units=("mlp",)), tokenizer)
    assert len(report.continuations) == 3
    assert report.save(tmp_path).is_file() and PruneReport.load(tmp_path).continuations == report.continuations
    assert "continued by both" in (tmp_path / "report.html").read_text(encoding="utf-8")
