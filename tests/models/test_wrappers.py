"""Objects of other libraries in place of a model."""

import pytest
import torch
from command_line import WORDS, save_encoder
from peft import LoraConfig, get_peft_model
from tiny import tiny
from transformers import AutoModel, AutoTokenizer, pipeline

from hf_subprune import PruneConfig, prune, prune_sizes
from hf_subprune.models.wrappers import taken_out

CONFIG = PruneConfig(units=("mlp",), samples=12, held_out=4, batch_size=4)
TEXTS = [" ".join(WORDS[i % 7 : i % 7 + 5]) + f" {WORDS[i % 14]}" for i in range(20)]


def test_a_sentence_transformer_is_pruned_inside(tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    folder = save_encoder(tmp_path / "model")
    AutoModel.from_pretrained(folder).save_pretrained(folder)
    encoder = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    before = encoder.transformers_model.num_parameters()
    report = prune(encoder, TEXTS, CONFIG)
    assert encoder.transformers_model.num_parameters() == report.parameters.after < before
    assert encoder.encode(TEXTS[:2]).shape[0] == 2


def test_a_pipeline_is_pruned_inside(tmp_path):
    folder = save_encoder(tmp_path / "model")
    classifier = pipeline("text-classification", model=str(folder), device="cpu")
    before = classifier.model.num_parameters()
    (report,) = prune_sizes(classifier, TEXTS, [CONFIG])
    assert report.parameters.after < report.parameters.before == before == classifier.model.num_parameters()
    prune(classifier, TEXTS, CONFIG)
    assert classifier.model.num_parameters() == report.parameters.after
    assert classifier(TEXTS[0])[0]["score"] > 0


def test_an_adapter_must_be_merged_first_and_is_no_hindrance_then(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(save_encoder(tmp_path / "model"))
    wrapped = get_peft_model(tiny("llama"), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="merge_and_unload"):
        prune(wrapped, TEXTS, CONFIG, tokenizer)
    merged = wrapped.merge_and_unload()
    prune(merged, TEXTS, CONFIG, tokenizer)
    assert taken_out(wrapped)[0] is wrapped.get_base_model()  # the wrapper holds no adapter any more


def test_an_engine_of_vllm_is_refused_with_what_to_do():
    engine = type("LLM", (), {"__module__": "vllm.entrypoints.llm"})()
    with pytest.raises(TypeError, match="prune the checkpoint that it was started from"):
        prune(engine, TEXTS)


@pytest.mark.parametrize("other", [torch.nn.Linear(2, 2), "bert-base", None])
def test_anything_else_is_what_it_is(other):
    assert taken_out(other, "tokenizer") == (other, "tokenizer")
