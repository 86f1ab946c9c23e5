"""Text that a model makes up itself."""

import pytest
import torch
from small_models import SIZES
from small_texts import WORDS, make_tokenizer
from tiny import tiny
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from hf_subprune import PruneConfig, generated_text, prune


@pytest.fixture(scope="module")
def llama():
    """A model of five ids more than its tokenizer has, whose generation is configured to be dull."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=48, eos_token_id=2, max_position_embeddings=32, **SIZES)).eval()
    model.generation_config.update(temperature=0.1, top_k=1, max_new_tokens=3, repetition_penalty=9.0)
    return model


def test_texts_are_of_the_models_words_as_long_and_as_many_as_asked_for(llama, tokenizer):
    texts = generated_text(llama, tokenizer, samples=7, max_length=12, batch_size=3)
    assert [len(text.split()) for text in texts] == [12] * 7
    assert {word for text in texts for word in text.split()} <= set(WORDS)
    assert len(set(texts)) == 7
    assert len({text.split()[0] for text in texts}) > 3  # what the tokenizer adds stands behind


def test_the_same_seed_gives_the_same_texts_and_nothing_is_disturbed(llama, tokenizer):
    state, config = torch.get_rng_state(), llama.generation_config.to_dict()
    llama.train()
    first, again, other = (generated_text(llama, tokenizer, samples=4, max_length=8, seed=seed) for seed in (0, 0, 1))
    assert first == again != other
    assert torch.equal(torch.get_rng_state(), state) and llama.generation_config.to_dict() == config
    assert llama.training
    llama.eval()


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": True, "num_return_sequences": 2},
        {"min_p": 0.9},
        {"max_time": 0.0},
        {"return_dict_in_generate": True},
    ],
)
def test_the_models_settings_of_generation_do_not_count(llama, tokenizer, settings):
    expected, own = generated_text(llama, tokenizer, samples=3, max_length=8), llama.generation_config
    llama.generation_config = GenerationConfig(**settings)
    try:
        assert generated_text(llama, tokenizer, samples=3, max_length=8) == expected
    finally:
        llama.generation_config = own


def test_tokens_are_drawn_from_the_models_distribution(tokenizer):
    model = LlamaForCausalLM(LlamaConfig(vocab_size=43, **SIZES)).eval()
    with torch.no_grad():  # two words that are as likely, whatever was said; all others are not
        model.model.norm.weight.zero_()
        model.lm_head = torch.nn.Linear(SIZES["hidden_size"], 43)
        model.lm_head.bias.fill_(-100.0)
        model.lm_head.bias[[2, 10, 20]] = torch.tensor([50.0, 0.0, 0.0])  # and the end, which is left out
    words = [word for text in generated_text(model, tokenizer, samples=20, max_length=21) for word in text.split()[1:]]
    assert set(words) == {WORDS[7], WORDS[17]}
    assert words.count(WORDS[7]) == pytest.approx(200, abs=50)


def test_what_the_tokenizer_puts_in_front_begins_every_text(llama, tokenizer, monkeypatch):
    begun = []

    def generate(start, **options):
        begun.append(start)
        return start

    monkeypatch.setattr(llama, "generate", generate, raising=False)
    front = make_tokenizer(ends=0)
    front.backend_tokenizer.post_processor = type(front.backend_tokenizer.post_processor)(
        single="[EOS] $A", special_tokens=[("[EOS]", 2)]
    )
    assert generated_text(llama, front, samples=3, max_length=8) == [""] * 3
    assert begun[0].tolist() == [[2]] * 3


def test_no_text_is_longer_than_the_model_takes(llama, tokenizer):
    (text,) = generated_text(llama, tokenizer, samples=1, max_length=500)
    assert len(text.split()) == 32


def test_a_model_is_pruned_on_its_own_text(llama, tokenizer):
    texts = generated_text(llama, tokenizer, samples=24, max_length=16)
    model = tiny("llama")
    report = prune(model, texts, PruneConfig(samples=20, held_out=4, keep=0.7), tokenizer)
    assert report.data["fit_samples"] == 20 and report.parameters.ratio < 1


@pytest.mark.parametrize("family", ["bert", "t5", "vit"])
def test_models_that_do_not_go_on_with_text_are_refused(family, tokenizer):
    with pytest.raises(ValueError, match=r"does not go on with text.*AutoModelForCausalLM"):
        generated_text(tiny(family), tokenizer)


def test_numbers_and_tokenizers_that_make_no_text_are_refused(llama, tokenizer):
    with pytest.raises(ValueError, match="LlamaModel does not go on with text"):
        generated_text(llama.model, tokenizer)
    with pytest.raises(TypeError, match="needs the model's tokenizer, got NoneType"):
        generated_text(llama, None)
    for wrong in ({"samples": 0}, {"batch_size": 0}, {"max_length": 1}):
        with pytest.raises(ValueError, match="must be 1 or more, and texts longer than the 1 tokens"):
            generated_text(llama, tokenizer, **wrong)
    with pytest.raises(TypeError, match=r"`samples` is a number of texts or tokens, a whole one, not 6\.5"):
        generated_text(llama, tokenizer, samples=6.5)
