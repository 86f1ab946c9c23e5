import torch
from transformers import T5Config, T5ForConditionalGeneration

from hf_subprune.data.padding import token_mask


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
