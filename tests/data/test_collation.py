import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from small_texts import SMALL, TEXT_MODEL, TEXTS, make_bert, make_tokenizer, texts_of
from torch.utils.data import DataLoader
from transformers import (
    BertForSequenceClassification,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
    Wav2Vec2FeatureExtractor,
)

from hf_subprune.config import PruneConfig
from hf_subprune.data.reading import read


def test_strings_become_batches_of_like_length_padded_on_the_right(bert):
    tokenizer = make_tokenizer(side="left")
    prepared = read(bert, TEXTS, PruneConfig(**SMALL), tokenizer)

    assert (prepared.fit_samples, prepared.held_out_samples) == (8, 4)
    assert [len(b["input_ids"]) for b in prepared.fit] == [2, 2, 2, 2]  # an even number of batches: two equal folds
    assert sum(len(b["input_ids"]) for b in prepared.held_out) == 4
    longest = [b["input_ids"].shape[1] for b in prepared.fit]
    assert longest == sorted(longest)
    for batch in prepared.fit + prepared.held_out:
        mask = batch["attention_mask"]
        assert mask[:, 0].all()
        assert mask.sum(1).max() == mask.shape[1]
        assert (mask.diff(dim=1) <= 0).all()
        assert (batch["input_ids"][mask == 0] == tokenizer.pad_token_id).all()
        bert(**batch)
    fitted, held_out = texts_of(prepared.fit, tokenizer), texts_of(prepared.held_out, tokenizer)
    assert set(fitted + held_out) <= set(TEXTS)
    assert tokenizer.padding_side == "left"
    batches = prepared.fit + prepared.held_out
    padding, every = (
        sum(count(b["attention_mask"]) for b in batches) for count in (lambda m: (m == 0).sum(), torch.numel)
    )
    assert prepared.description == {
        "source": "list of str",
        "fit_samples": 8,
        "held_out_samples": 4,
        "fit_tokens": sum(len(text.split()) + 1 for text in fitted),
        "held_out_tokens": sum(len(text.split()) + 1 for text in held_out),
        "cut": 0.0,
        "padded": pytest.approx(int(padding) / every),
    }


def test_ready_batches_lose_their_labels_and_are_cut(tokenizer):
    model = make_bert(BertForSequenceClassification)
    rows = [{**tokenizer(text, padding="max_length", max_length=9), "labels": i % 2} for i, text in enumerate(TEXTS)]
    loader = DataLoader(Dataset.from_list(rows).with_format("torch"), batch_size=10)
    prepared = read(model, loader, PruneConfig(samples=12, held_out=4, batch_size=8))
    assert [len(b["input_ids"]) for b in prepared.fit] == [6, 4, 2]
    assert [len(b["input_ids"]) for b in prepared.held_out] == [4]
    for batch in prepared.fit + prepared.held_out:
        assert "labels" not in batch
        assert model(**batch).loss is None
    assert torch.equal(prepared.fit[2]["input_ids"][0], torch.tensor(rows[10]["input_ids"]))


def test_one_ready_batch_is_enough(bert, tokenizer):
    prepared = read(bert, tokenizer(TEXTS[:10], padding=True, return_tensors="pt"), PruneConfig())
    assert [len(b["input_ids"]) for b in prepared.fit] == [4, 4]
    assert [len(b["input_ids"]) for b in prepared.held_out] == [2]


def test_ready_batches_that_cannot_be_cut_stay_whole(bert):
    batches = [{"input_ids": torch.full((2, 4), 3), "position_ids": torch.arange(4)[None]} for _ in range(6)]
    prepared = read(bert, iter(batches), PruneConfig(batch_size=1))
    assert [len(b["input_ids"]) for b in prepared.fit] == [2] * 5
    assert (prepared.fit_samples, prepared.held_out_samples) == (10, 2)
    assert prepared.probe is prepared.fit[0]


def test_batches_of_patches_are_counted_by_their_images(bert):
    batches = [
        {"pixel_values": torch.randn(32, 6), "image_grid_thw": torch.tensor([[1, 4, 4]] * 2)} for _ in range(99)
    ]
    prepared = read(bert, iter(batches), PruneConfig(samples=8, held_out=2))
    assert (prepared.fit_samples, prepared.held_out_samples) == (8, 2)
    assert (len(prepared.fit), len(prepared.held_out)) == (4, 1)
    fewest = read(bert, iter(batches), PruneConfig(samples=1, held_out=1))
    assert (len(fewest.fit), len(fewest.held_out)) == (2, 1)
    with pytest.raises(
        ValueError, match=r"at least 3 batches whose tensors do not share a first dimension .* Found 2"
    ):
        read(bert, batches[:2], PruneConfig())


def test_no_more_batches_are_read_than_needed(bert):
    given = []

    def source():
        for i in range(1000):
            given.append(i)
            yield {"input_ids": torch.full((4, 5), 3)}

    read(bert, source(), PruneConfig(**SMALL))
    assert len(given) == 3


def test_waveforms_are_cut_to_the_shortest_so_that_nothing_is_padding(wav2vec2):
    clips = [np.ones(400 + 100 * i, dtype=np.float32) for i in range(6)]
    prepared = read(wav2vec2, clips, PruneConfig(), Wav2Vec2FeatureExtractor())
    assert all(set(batch) == {"input_values"} for batch in prepared.fit)
    assert min(batch["input_values"].shape[1] for batch in prepared.fit) in (400, 500)


def test_a_fixed_shrinkage_needs_fewer_samples(bert, tokenizer):
    prepared = read(bert, TEXTS[:2], PruneConfig(shrinkage=0.1), tokenizer)
    assert (prepared.fit_samples, prepared.held_out_samples) == (1, 1)


def test_images_of_different_sizes_are_refused():
    model = ViTModel(ViTConfig(image_size=16, patch_size=8, **TEXT_MODEL)).eval()
    images = [Image.new("RGB", (16, 16 + i)) for i in range(6)]
    with pytest.raises(ValueError, match=r"pixel_values of one batch must have one shape.*resize to one size"):
        read(model, images, PruneConfig(), ViTImageProcessor(do_resize=False))
