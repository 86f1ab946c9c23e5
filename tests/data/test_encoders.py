import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from small_texts import SMALL, TEXT_MODEL, TEXTS, make_bert, texts_of
from speech import make_processor, sounds, tiny_whisper
from transformers import (
    ASTConfig,
    ASTModel,
    BertForQuestionAnswering,
    BertModel,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    VideoMAEConfig,
    VideoMAEModel,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
    VJEPA2Config,
    VJEPA2Model,
    Wav2Vec2FeatureExtractor,
    WhisperModel,
)

from hf_subprune.config import PruneConfig
from hf_subprune.data.datafiles import load_data
from hf_subprune.data.padding import token_mask
from hf_subprune.data.reading import batch_all, read


@pytest.mark.parametrize("columns", [["text", "title"], ["sentence"], ["text", "label", "label_text"]])
@pytest.mark.parametrize("streaming", [False, True])
def test_datasets_find_their_text_column(bert, tokenizer, columns, streaming):
    data = Dataset.from_dict({name: ["label"] * 30 if name != columns[0] else TEXTS for name in columns})
    data = data.to_iterable_dataset() if streaming else data
    prepared = read(bert, data, PruneConfig(**SMALL), tokenizer)
    assert set(texts_of(prepared.fit, tokenizer)) <= set(TEXTS)
    assert prepared.source.startswith("IterableDataset" if streaming else "Dataset")


def test_a_tokenized_dataset_needs_no_tokenizer(bert, tokenizer):
    data = Dataset.from_dict({"text": TEXTS, "labels": [[1]] * 30}).map(lambda row: tokenizer(row["text"]))
    for rows in (data, data.with_format("torch"), data.to_iterable_dataset()):
        prepared = read(bert, rows, PruneConfig(**SMALL, max_length=5))
        assert set(prepared.fit[0]) == {"input_ids", "attention_mask"}
        assert max(b["input_ids"].shape[1] for b in prepared.fit) == 5


def test_token_ids_without_a_mask_get_one(bert):
    data = Dataset.from_dict({"input_ids": [[3] * (2 + i) for i in range(6)]})
    prepared = read(bert, data, PruneConfig(**SMALL))
    for batch in prepared.fit:
        assert torch.equal(batch["attention_mask"], (batch["input_ids"] == 3).long())


@pytest.mark.parametrize("labels", ["labels", "label", "idx"])
def test_rows_of_tensors_are_samples(bert, tokenizer, wav2vec2, whisper_config, labels):
    ast = ASTModel(ASTConfig(**TEXT_MODEL, max_length=32, num_mel_bins=16))
    vit = ViTModel(ViTConfig(image_size=16, patch_size=8, **TEXT_MODEL))
    video = VideoMAEModel(VideoMAEConfig(image_size=16, patch_size=8, num_frames=4, **TEXT_MODEL))
    vjepa = VJEPA2Model(
        VJEPA2Config(
            image_size=16, crop_size=16, patch_size=8, frames_per_clip=4, **TEXT_MODEL,
            pred_hidden_size=16, pred_num_attention_heads=2, pred_num_hidden_layers=1,
        )
    )  # fmt: skip
    for model, name, shape in (
        (vit, "pixel_values", (3, 16, 16)),
        (video, "pixel_values", (4, 3, 16, 16)),
        (vjepa, "pixel_values_videos", (4, 3, 16, 16)),
        (wav2vec2, "input_values", (400,)),
        (ast, "input_values", (32, 16)),
        (WhisperModel(whisper_config), "input_features", (8, 3000)),
    ):
        rows = [{name: torch.randn(shape), labels: torch.tensor(i)} for i in range(8)]
        prepared = read(model, rows, PruneConfig(**SMALL))
        assert (prepared.fit_samples, prepared.held_out_samples) == (7, 1), model
        assert prepared.fit[0][name].shape[1:] == shape
        ready = read(model, [{name: torch.randn(8, *shape)}], PruneConfig(**SMALL))
        assert (ready.fit_samples, ready.fit[0][name].shape[1:]) == (7, shape)


def test_tensors_beside_a_text_or_image_make_no_batch(bert, tokenizer):
    texts = Dataset.from_dict({"text": TEXTS, "label": list(range(30))}).with_format("torch")
    assert read(bert, texts, PruneConfig(**SMALL), tokenizer).fit_samples == 8
    model = ViTModel(ViTConfig(image_size=16, patch_size=8, **TEXT_MODEL)).eval()
    images = [{"image": torch.randint(0, 255, (3, 20, 20), dtype=torch.uint8)} for _ in range(6)]
    prepared = read(model, images, PruneConfig(), ViTImageProcessor(size={"height": 16, "width": 16}))
    assert prepared.fit[0]["pixel_values"].shape[1:] == (3, 16, 16)


@pytest.mark.parametrize("kind", ["images", "arrays", "dataset", "stream"])
def test_images(kind):
    pixels = np.random.default_rng(0).integers(0, 255, (8, 20, 24, 3), dtype=np.uint8)
    images = [Image.fromarray(array) for array in pixels]
    images[0] = images[0].convert("L")  # grey images become RGB
    if kind == "arrays":
        images = list(pixels)
    elif kind in ("dataset", "stream"):
        images = Dataset.from_dict({"picture": images, "label": list(range(8)), "file": ["a"] * 8})
        images = images.to_iterable_dataset() if kind == "stream" else images
    model = ViTModel(ViTConfig(image_size=16, patch_size=8, **TEXT_MODEL)).eval()
    prepared = read(model, images, PruneConfig(), ViTImageProcessor(size={"height": 16, "width": 16}))
    assert (prepared.fit_samples, prepared.held_out_samples) == (7, 1)
    assert set(prepared.fit[0]) == {"pixel_values"}
    assert prepared.fit[0]["pixel_values"].shape == (4, 3, 16, 16) or prepared.fit[0]["pixel_values"].shape == (
        3,
        3,
        16,
        16,
    )
    assert prepared.description["fit_tokens"] is None


def test_processed_images_in_a_file_are_of_the_precision_that_models_take(tmp_path):
    pixels = torch.rand(8, 3, 16, 16)
    file = tmp_path / "images.parquet"
    Dataset.from_dict({"pixel_values": pixels.tolist(), "labels": list(range(8))}).to_parquet(file)
    model = ViTModel(ViTConfig(image_size=16, patch_size=8, **TEXT_MODEL)).eval()
    batch = read(model, load_data(str(file)), PruneConfig()).fit[0]
    assert set(batch) == {"pixel_values"} and batch["pixel_values"].dtype == torch.float32
    assert any(torch.equal(batch["pixel_values"][0], image) for image in pixels)
    model(**batch)


def test_text_and_images_together(tokenizer):
    tower = {**TEXT_MODEL, "projection_dim": 8}
    config = CLIPConfig(
        text_config={**tower, "vocab_size": 43, "max_position_embeddings": 12, "eos_token_id": 2},
        vision_config={**tower, "image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    model = CLIPModel(config).eval()
    processor = CLIPProcessor(
        CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}), tokenizer
    )
    data = Dataset.from_dict({"caption": TEXTS[:6], "image": [Image.new("RGB", (16, 16))] * 6})
    batch = read(model, data, PruneConfig(max_length=5), processor).fit[-1]
    assert {"input_ids", "attention_mask", "pixel_values"} <= set(batch)
    model(**batch)

    # Five tokens and five patches: what tells them apart is where the consumer lies, not the shape.
    batch = {**batch, "attention_mask": torch.tensor([[1, 1, 1, 0, 0]] * len(batch["input_ids"]))}
    shape = (len(batch["input_ids"]), 5, 16)
    assert token_mask(model, "vision_model.encoder.layers.0.mlp.fc2", batch, shape) is None
    assert token_mask(model, "text_model.encoder.layers.0.mlp.fc2", batch, shape).sum() == 3 * len(batch["input_ids"])


def test_answer_positions_are_labels():
    model = make_bert(BertForQuestionAnswering)
    batch = {"input_ids": torch.full((6, 5), 3), "start_positions": torch.zeros(6), "end_positions": torch.ones(6)}
    assert set(read(model, [batch], PruneConfig()).fit[0]) == {"input_ids"}


def test_other_sampling_rates_become_that_of_the_model(wav2vec2):
    clip = np.random.default_rng(0).normal(size=800)
    data = [{"audio": {"array": clip, "sampling_rate": rate}} for rate in (8000, 8000, 16000, 16000)]
    prepared = read(wav2vec2, data, PruneConfig(), Wav2Vec2FeatureExtractor())
    assert {len(row) for batch in (*prepared.fit, *prepared.held_out) for row in batch["input_values"]} == {1600, 800}


def test_a_clip_that_is_padded_to_one_length_has_a_mask_of_its_frames():
    clip = np.concatenate([sounds(1)[0], np.zeros(777)])
    (batch,) = batch_all(tiny_whisper(), [clip], make_processor())
    frames = math.ceil((len(clip) - 777) / 160)
    assert batch["attention_mask"].sum() == batch["attention_mask"][0, :frames].sum() == frames
    assert batch["input_features"].shape == (1, 16, 100)


def test_raw_text_needs_a_tokenizer(bert, tokenizer):
    with pytest.raises(ValueError, match="Raw text needs processing_class: pass the model's tokenizer"):
        read(bert, TEXTS, PruneConfig())
    with pytest.raises(ValueError, match="The data holds text but processing_class is ViTImageProcessor"):
        read(bert, TEXTS, PruneConfig(), ViTImageProcessor())


def test_raw_images_need_an_image_processor(tokenizer):
    model = ViTModel(ViTConfig(image_size=16, patch_size=8, **TEXT_MODEL)).eval()
    with pytest.raises(ValueError, match="The data holds image but processing_class is"):
        read(model, [Image.new("RGB", (16, 16))] * 4, PruneConfig(), tokenizer)
    said = r"no image column for ViTModel.*file names.*datasets\.Image\(\).*"
    with pytest.raises(ValueError, match=said + r"Its items are of type str\."):
        read(model, ["a.png"] * 4, PruneConfig(), ViTImageProcessor())
    with pytest.raises(ValueError, match=said + "Columns found: 'image' of type str"):
        read(model, [{"image": "a.png"}] * 4, PruneConfig(), ViTImageProcessor())


def test_a_forward_without_named_inputs_takes_ready_batches_only(bert, tokenizer):
    class Wrapped(BertModel):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    model = Wrapped(bert.config)
    with pytest.raises(ValueError, match=r"Wrapped\.forward names no input .* only args, kwargs: .*ready batches"):
        read(model, TEXTS, PruneConfig(), tokenizer)
    assert read(model, [{"input_ids": torch.full((6, 4), 3)}], PruneConfig()).fit_samples == 5


def test_images_inside_the_text_must_come_ready(tokenizer):
    model = CLIPModel(
        CLIPConfig(
            text_config={**TEXT_MODEL, "vocab_size": 43, "eos_token_id": 2},
            vision_config={**TEXT_MODEL, "image_size": 16, "patch_size": 8},
        )
    )
    processor = CLIPProcessor(CLIPImageProcessor(), tokenizer)
    processor.image_token = "<image>"
    with pytest.raises(ValueError, match="CLIPProcessor places images inside the text: pass ready batches"):
        read(model, [{"text": "w1", "image": Image.new("RGB", (16, 16))}] * 4, PruneConfig(), processor)
