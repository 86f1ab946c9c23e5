import itertools
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from small_texts import SMALL, TEXT_MODEL, TEXTS
from speech import make_processor, sounds, tiny_whisper, write_sounds
from transformers import (
    BartConfig,
    BartModel,
    BertConfig,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperModel,
)
from transformers.utils import logging

from hf_subprune.config import PruneConfig
from hf_subprune.data.datafiles import load_data
from hf_subprune.data.reading import batch_all, read


def test_text_models_decode_their_own_input_shifted(tokenizer):
    model = T5ForConditionalGeneration(
        T5Config(vocab_size=43, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0)
    ).eval()
    for data, processing_class in (
        (TEXTS, tokenizer),
        ([{**tokenizer(TEXTS, padding=True, return_tensors="pt"), "labels": torch.zeros(30, 4)}], None),
    ):
        batch = read(model, data, PruneConfig(**SMALL), processing_class).fit[-1]
        assert (batch["decoder_input_ids"][:, 0] == 0).all()
        assert torch.equal(batch["decoder_input_ids"][:, 1:], batch["input_ids"][:, :-1])
        assert torch.equal(batch["decoder_attention_mask"][:, 1:], batch["attention_mask"][:, :-1])
        assert model(**batch).loss is None


@pytest.mark.parametrize(("decoder_vocabulary", "shifted"), [(43, True), (50, False)])
def test_a_decoder_with_its_own_vocabulary_generates(tokenizer, monkeypatch, decoder_vocabulary, shifted):
    config = EncoderDecoderConfig.from_encoder_decoder_configs(
        BertConfig(vocab_size=43, **TEXT_MODEL), BertConfig(vocab_size=decoder_vocabulary, **TEXT_MODEL)
    )
    config.decoder_start_token_id = config.pad_token_id = 1
    model = EncoderDecoderModel(config).eval()
    monkeypatch.setattr(model, "generate", lambda **inputs: torch.full((len(inputs["input_ids"]), 3), 49))
    batch = read(model, TEXTS, PruneConfig(**SMALL), tokenizer).fit[0]
    assert (batch["decoder_input_ids"][:, 0] == 1).all() == shifted
    assert (batch["decoder_input_ids"] == 49).all() != shifted
    with pytest.raises(ValueError, match="token id 49, but EncoderDecoderModel embeds 43"):
        read(model, [{"input_ids": torch.full((4, 4), 49)}], PruneConfig())


def test_given_decoder_inputs_are_kept():
    model = BartModel(
        BartConfig(
            vocab_size=43,
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
        )
    ).eval()
    batch = {"input_ids": torch.full((6, 5), 3), "decoder_input_ids": torch.full((6, 2), 4)}
    assert read(model, [batch], PruneConfig()).fit[0]["decoder_input_ids"].shape == (3, 2)


def test_speech_models_decode_what_they_generate(whisper_config):
    torch.manual_seed(0)
    model = WhisperForConditionalGeneration(whisper_config).train()
    clips = list(np.random.default_rng(0).normal(size=(4, 4000)).astype(np.float32))
    data = Dataset.from_dict({"audio": [{"array": clip, "sampling_rate": 16000} for clip in clips], "text": TEXTS[:4]})
    for source in (clips, data):
        prepared = read(model, source, PruneConfig(), WhisperFeatureExtractor(feature_size=8))
        batch = prepared.fit[0]
        assert batch["input_features"].shape[1:] == (8, 3000)
        assert (batch["decoder_input_ids"][:, 0] == 1).all()
        assert batch["decoder_attention_mask"].shape == batch["decoder_input_ids"].shape
        assert batch["decoder_attention_mask"][:, 0].all()
        assert model(**batch).loss is None
    assert model.training


def test_generation_is_bounded_by_the_time_that_a_sound_takes():
    model, extractor = tiny_whisper(max_source_positions=200), WhisperFeatureExtractor(feature_size=16, chunk_length=4)
    model.generation_config.update(min_new_tokens=60, eos_token_id=None)  # it never stops by itself
    clips = [np.full(seconds * 16_000, 0.5, dtype=np.float32) for seconds in (1, 2, 4)]
    said = [batch["decoder_input_ids"].shape[1] for clip in clips for batch in batch_all(model, [clip], extractor)]
    assert [longer - shorter for shorter, longer in itertools.pairwise(said)] == [8, 16]  # eight tokens a second


def test_transcripts_beside_sounds_are_what_the_decoder_reads(tmp_path):
    model, processor = tiny_whisper(), make_processor()
    start, text_only, end = 257, [64, 65, 220, 66], 256
    write_sounds(tmp_path, sounds(4), ["ab c", "ab c", "a", "a"])
    assert processor.tokenizer("ab c")["input_ids"] == [start, 258, *text_only, end]
    samples = read(model, load_data(str(tmp_path)), PruneConfig(batch_size=4), processor)
    seen = {
        tuple(ids[mask.bool()].tolist())
        for batch in (*samples.fit, *samples.held_out)
        for ids, mask in zip(batch["decoder_input_ids"], batch["decoder_attention_mask"], strict=True)
    }
    assert seen == {(start, 258, *text_only), (start, 258, 64)}
    without = read(model, load_data(str(tmp_path)), PruneConfig(), processor.feature_extractor)
    assert without.fit[0]["decoder_input_ids"].shape[1] > 2  # without a tokenizer, what the model says


def test_a_tokenizer_that_adds_nothing_in_front_gets_the_start_token(tokenizer):
    processor = SimpleNamespace(feature_extractor=make_processor().feature_extractor, tokenizer=tokenizer)
    rows = [{"audio": wave, "transcription": "w0 w1"} for wave in sounds(3)]
    model = tiny_whisper(vocab_size=43, pad_token_id=0, eos_token_id=2, decoder_start_token_id=2, bos_token_id=2)
    batch = read(model, rows, PruneConfig(), processor).fit[0]
    assert batch["decoder_input_ids"][0].tolist() == [2, 3, 4]


def test_generation_warns_of_nothing_and_leaves_the_model_as_it_was(capfd):
    model, processor = tiny_whisper(), make_processor()
    for name, value in {"temperature": 0.7, "max_new_tokens": 3, "num_beams": 2, "suppress_tokens": [5]}.items():
        setattr(model.generation_config, name, value)  # `update` would warn itself
    before, verbosity = model.generation_config.to_dict(), logging.get_verbosity()
    logging.set_verbosity_warning()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            read(model, sounds(4), PruneConfig(samples=3, held_out=1), processor)
    finally:
        logging.set_verbosity(verbosity)
    assert capfd.readouterr().err == ""
    assert model.generation_config.to_dict() == before


def test_generation_stays_within_the_decoder_s_positions(whisper_config):
    config = WhisperConfig.from_dict({**whisper_config.to_dict(), "max_target_positions": 5})
    clips = list(np.random.default_rng(0).normal(size=(4, 4000)).astype(np.float32))
    model = WhisperForConditionalGeneration(config).eval()
    batch = read(model, clips, PruneConfig(), WhisperFeatureExtractor(feature_size=8)).fit[0]
    assert batch["decoder_input_ids"].shape[1] <= 5
    assert model(**batch).logits.isfinite().all()


def test_generated_tokens_behind_the_end_are_padding(whisper_config, monkeypatch):
    model = WhisperForConditionalGeneration(whisper_config).eval()
    generated = torch.tensor([[1, 5, 2, 0, 0], [1, 5, 6, 7, 8]])
    monkeypatch.setattr(model, "generate", lambda **_: generated)
    batch = read(model, [{"input_features": torch.zeros(4, 8, 3000)}], PruneConfig()).fit[0]
    assert torch.equal(batch["decoder_input_ids"], generated)
    assert batch["decoder_attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]


def test_a_decoder_that_cannot_generate_gets_its_start_token(whisper_config):
    model = WhisperModel(whisper_config).eval()
    batch = read(model, [{"input_features": torch.zeros(4, 8, 3000)}], PruneConfig()).fit[0]
    assert batch["decoder_input_ids"].tolist() == [[1], [1]]
