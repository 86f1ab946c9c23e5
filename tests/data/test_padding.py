import numpy as np
import pytest
import torch
from speech import RATE, make_processor, sounds, tiny_whisper
from transformers import T5Config, T5ForConditionalGeneration

from hf_subprune.data.padding import spoken_frames, token_mask


def test_masks_of_waveforms_are_reduced_to_frames(wav2vec2):
    batch = {"input_values": torch.randn(2, 400), "attention_mask": torch.ones(2, 400, dtype=torch.long)}
    batch["attention_mask"][1, 200:] = 0
    with torch.no_grad():
        frames = wav2vec2(**batch).last_hidden_state.shape[1]
    mask = token_mask(wav2vec2, "encoder.layers.0.feed_forward.output_dense", batch, (2, frames, 24))
    mask = mask.view(2, frames)
    assert mask[0].all()
    assert 0 < mask[1].sum() < 0.6 * frames
    assert (mask[1].int().diff() <= 0).all()


def test_masks_fit_the_layouts_of_rows(bert):
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    batch = {"input_ids": torch.full((2, 4), 3), "attention_mask": mask}
    where = "encoder.layer.0.output.dense"
    expected = [True, True, True, False, True, False, False, False]
    assert token_mask(bert, where, batch, (2, 4, 24)).tolist() == expected
    assert token_mask(bert, where, batch, (8, 24)).tolist() == expected
    assert token_mask(bert, where, batch, (4, 2, 24)).tolist() == mask.bool().T.flatten().tolist()
    assert token_mask(bert, where, batch, (2, 24)) is None
    assert token_mask(bert, where, {**batch, "attention_mask": torch.ones_like(mask)}, (2, 4, 24)) is None
    assert token_mask(bert, where, {**batch, "attention_mask": torch.ones(2, 1, 4, 4)}, (2, 4, 24)) is None


def test_choices_are_masked_as_the_samples_that_they_run_as(bert):
    mask = torch.tensor([[[1, 1, 0], [1, 0, 0]], [[1, 1, 1], [1, 1, 0]]])
    batch = {"input_ids": torch.full((2, 2, 3), 3), "attention_mask": mask}
    found = token_mask(bert, "encoder.layer.0.output.dense", batch, (4, 3, 24))
    assert found.tolist() == mask.bool().flatten().tolist()


def test_decoders_have_their_own_mask(tokenizer):
    model = T5ForConditionalGeneration(T5Config(vocab_size=43, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2))
    batch = {
        "attention_mask": torch.tensor([[1, 1, 0]]),
        "decoder_attention_mask": torch.tensor([[1, 0, 0]]),
    }
    encoder = token_mask(model, "encoder.block.0.layer.1.DenseReluDense.wo", batch, (1, 3, 24))
    cross = token_mask(model, "decoder.block.0.layer.1.EncDecAttention.o", batch, (1, 3, 16))
    assert encoder.tolist() == [True, True, False]
    assert cross.tolist() == token_mask(model, "", batch, (1, 3, 43)).tolist() == [True, False, False]
    del batch["decoder_attention_mask"]
    assert token_mask(model, "decoder.block.0.layer.1.EncDecAttention.o", batch, (1, 3, 16)) is None


ENCODER, DECODER = "model.encoder.layers.0.fc2", "model.decoder.layers.0.fc2"


@pytest.fixture(scope="module")
def spoken():
    """Spectrograms of a whole second, of which parts hold sound, with and without the extractor's mask."""
    waves = [wave[: 160 * frames] for wave, frames in zip(sounds(3, longest=2 * RATE), (20, 51, 30), strict=True)]
    waves.append(np.concatenate([sounds(1)[0][:1600], np.zeros(1600), sounds(1)[0][:1600]]))  # a pause in between
    extractor = make_processor().feature_extractor
    return dict(extractor(waves, sampling_rate=RATE, return_tensors="pt", return_attention_mask=True))


def test_frames_behind_the_sound_are_padding_in_the_encoder_but_for_a_few(spoken):
    model, lengths = tiny_whisper(), torch.tensor([20, 51, 30, 30])
    spoken["decoder_attention_mask"] = torch.tensor([[1, 1, 0]] * 4)
    mask = token_mask(model, ENCODER, spoken, (4, 50, 56))
    heard, place = (lengths + 1) // 2, torch.arange(50)
    silent = mask.view(4, 50) & (place >= heard[:, None])
    assert torch.equal(mask.view(4, 50) ^ silent, place < heard[:, None])
    assert torch.equal(silent.sum(1), (50 - heard) // 10) and silent[:, -10:].any(1).all()  # some, up to the end
    assert torch.equal(token_mask(model, ENCODER, spoken, (200, 56)), mask)
    assert torch.equal(token_mask(model, "model.encoder.conv2", spoken, (4, 50, 1)), mask)
    fine = token_mask(model, "model.encoder.conv1", spoken, (4, 100, 1)).view(4, 100)
    assert torch.equal(fine.sum(1), lengths + (100 - lengths) // 10)
    # What the decoder computes from all that the encoder heard has the decoder's rows.
    assert token_mask(model, "model.decoder.layers.0.encoder_attn.out_proj", spoken, (4, 3, 48)).sum() == 8
    assert token_mask(model, "", spoken, (4, 3, 259)).sum() == 8


def test_without_a_mask_silence_at_the_end_tells_them(spoken):
    model = tiny_whisper()
    features = spoken["input_features"]
    alone = spoken_frames(model, {"input_features": features})
    masked = spoken_frames(model, {"input_features": features, "attention_mask": spoken["attention_mask"]})
    assert (alone & masked).equal(masked)
    assert (alone.sum(1) - masked.sum(1)).max() <= 2  # frames overlap
    noise = torch.randn(2, 16, 100)
    assert spoken_frames(model, {"input_features": noise}).all()
    assert spoken_frames(model, {"input_features": torch.zeros(2, 16, 100)}).sum() == 2  # one frame of each


def test_lengths_that_a_model_does_not_fix_are_all_heard(wav2vec2):
    assert spoken_frames(wav2vec2, {"input_values": torch.zeros(2, 400)}) is None
    assert spoken_frames(tiny_whisper(), {"input_features": torch.zeros(2, 16, 60)}) is None
