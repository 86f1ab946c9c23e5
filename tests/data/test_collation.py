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
from hf_subprune.data.collation import group_by_length
from hf_subprune.data.features import Sample
from hf_subprune.data.reading import read


def test_strings_become_batches_of_like_length_padded_on_the_right(bert):
    tokenizer = make_tokenizer(side="left")
    prepared = read(bert, TEXTS, PruneConfig(**SMALL), tokenizer)

    assert (prepared.fit_samples, prepared.held_out_samples) == (8, 4)
    sizes = [len(b["input_ids"]) for b in prepared.fit]
    assert sizes[0::2] == sizes[1::2] and sum(sizes) == 8 and max(sizes) <= 3  # two equal folds
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


def of_length(*lengths):
    return [Sample({"input_ids": torch.full((n,), 3)}) for n in lengths]


def test_folds_get_as_many_samples_of_the_same_lengths():
    groups = group_by_length(of_length(*range(100, 140)), 16, folds=2)
    first, second = ([len(s.features["input_ids"]) for group in groups[fold::2] for s in group] for fold in range(2))
    assert first == list(range(100, 140, 2)) and second == list(range(101, 140, 2))


def test_batches_are_smaller_where_much_would_be_padding():
    groups = group_by_length(of_length(*[10] * 15, 200, *[20] * 16, *range(50, 66)), 16)
    assert [len({len(s.features["input_ids"]) for s in group}) for group in groups][:2] == [1, 1]
    longest = sum(len(group) * max(len(s.features["input_ids"]) for s in group) for group in groups)
    assert sum(len(s.features["input_ids"]) for group in groups for s in group) > 0.95 * longest
    assert sum(map(len, groups)) == 48 and max(map(len, groups)) <= 16


def test_short_clips_are_not_what_long_ones_are_cut_to():
    clips = [Sample({"input_values": torch.zeros(n)}) for n in [400] * 8 + [8000] * 60]
    groups = group_by_length(clips, 16, folds=2)
    assert all(len({len(s.features["input_values"]) for s in group}) == 1 for group in groups)
