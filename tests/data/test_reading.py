import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset, DatasetDict, Features, IterableDataset, Value
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.utils.data import DataLoader
from transformers import (
    ASTConfig,
    ASTModel,
    BartConfig,
    BartModel,
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertModel,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5ForConditionalGeneration,
    VideoMAEConfig,
    VideoMAEModel,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
    VJEPA2Config,
    VJEPA2Model,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Model,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperModel,
)

from hf_subprune.config import PruneConfig
from hf_subprune.data import decoding
from hf_subprune.data import reading as calibration
from hf_subprune.data.datafiles import load_data
from hf_subprune.data.padding import token_mask
from hf_subprune.data.reading import batch_all, batch_some, read
from hf_subprune.evaluation.comparison import compare

WORDS = [f"w{i}" for i in range(40)]
TEXTS = [" ".join(WORDS[i % 7 : i % 7 + 3 + i % 5]) for i in range(30)]
SMALL = {"samples": 8, "held_out": 4, "batch_size": 3}
TEXT_MODEL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}


def make_tokenizer(pad="[PAD]", side="right", ends=1, **kwargs):
    vocabulary = {token: i for i, token in enumerate(["[PAD]", "[UNK]", "[EOS]", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    single = "$A" + " [EOS]" * ends
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("[EOS]", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=pad, eos_token="[EOS]", unk_token="[UNK]", padding_side=side, **kwargs
    )


def make_bert(cls=BertModel, **kwargs):
    config = {"vocab_size": 43, "max_position_embeddings": 64, **TEXT_MODEL, **kwargs}
    return cls(BertConfig(**config)).eval()


@pytest.fixture(scope="module")
def bert():
    return make_bert()


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def texts_of(batches, tokenizer):
    return [text for batch in batches for text in tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)]


# Kinds of data


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
    assert prepared.description == {
        "source": "list of str",
        "fit_samples": 8,
        "held_out_samples": 4,
        "fit_tokens": sum(len(text.split()) + 1 for text in fitted),
        "held_out_tokens": sum(len(text.split()) + 1 for text in held_out),
    }


def test_samples_are_drawn_by_the_seed_and_none_twice(bert, tokenizer):
    texts = [f"{a} {b}" for a in WORDS[:8] for b in WORDS[:8]]

    def drawn(seed):
        prepared = read(bert, texts, PruneConfig(**SMALL, seed=seed), tokenizer)
        return texts_of(prepared.fit + prepared.held_out, tokenizer)

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)
    assert len(set(drawn(1))) == 12


@pytest.mark.parametrize("columns", [["text", "title"], ["sentence"], ["text", "label", "label_text"]])
@pytest.mark.parametrize("streaming", [False, True])
def test_datasets_find_their_text_column(bert, tokenizer, columns, streaming):
    data = Dataset.from_dict({name: ["label"] * 30 if name != columns[0] else TEXTS for name in columns})
    data = data.to_iterable_dataset() if streaming else data
    prepared = read(bert, data, PruneConfig(**SMALL), tokenizer)
    assert set(texts_of(prepared.fit, tokenizer)) <= set(TEXTS)
    assert prepared.source.startswith("IterableDataset" if streaming else "Dataset")


def test_data_frames_are_read_by_their_rows(bert, tokenizer):
    frame = pd.DataFrame({"text": [None, *TEXTS], "label": range(31)}, index=[0] * 31)
    prepared = read(bert, frame, PruneConfig(**SMALL), tokenizer)
    assert (prepared.fit_samples, prepared.source) == (8, "DataFrame")
    assert set(texts_of(prepared.fit + prepared.held_out, tokenizer)) <= set(TEXTS)


def test_a_null_in_the_first_row_does_not_hide_the_column(bert, tokenizer):
    features = Features({"body": Value("string"), "id": Value("int64")})
    data = Dataset.from_dict({"body": [None, *TEXTS], "id": list(range(31))}, features=features)
    prepared = read(bert, data.to_iterable_dataset(), PruneConfig(**SMALL), tokenizer)
    assert prepared.fit_samples == 8


def test_blank_texts_are_passed_over(bert, tokenizer):
    prepared = read(bert, ["", " \n", *TEXTS[:5], ""], PruneConfig(**SMALL), tokenizer)
    assert (prepared.fit_samples, prepared.held_out_samples) == (4, 1)


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


def test_a_tokenizer_without_a_pad_token_is_left_without():
    bare = make_tokenizer(pad=None)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=43, n_positions=32, n_embd=16, n_layer=1, n_head=2)).eval()
    prepared = read(model, TEXTS, PruneConfig(**SMALL), bare)
    batch = prepared.fit[-1]
    assert (batch["input_ids"][batch["attention_mask"] == 0] == bare.eos_token_id).all()
    assert bare.pad_token is None


def test_lengths_obey_config_tokenizer_and_positions(tokenizer):
    text = [" ".join(WORDS)] * 5

    def length(model, tokenizer, **kwargs):
        return read(model, text, PruneConfig(**kwargs), tokenizer).fit[0]["input_ids"].shape[1]

    assert length(make_bert(), tokenizer) == 41
    assert length(make_bert(), tokenizer, max_length=10) == 10
    assert length(make_bert(), make_tokenizer(ends=2), max_length=1) == 1
    assert length(make_bert(), make_tokenizer(model_max_length=12)) == 12
    assert length(make_bert(max_position_embeddings=14), tokenizer) == 14
    roberta = RobertaModel(
        RobertaConfig(vocab_size=43, max_position_embeddings=18, pad_token_id=1, **TEXT_MODEL)
    ).eval()
    assert length(roberta, tokenizer) == 16
    roberta(**read(roberta, text, PruneConfig(), tokenizer).fit[0])


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


# Ready batches


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


def test_answer_positions_are_labels():
    model = make_bert(BertForQuestionAnswering)
    batch = {"input_ids": torch.full((6, 5), 3), "start_positions": torch.zeros(6), "end_positions": torch.ones(6)}
    assert set(read(model, [batch], PruneConfig()).fit[0]) == {"input_ids"}


# Encoder-decoder models


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


@pytest.fixture(scope="module")
def whisper_config():
    return WhisperConfig(
        vocab_size=43,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        num_mel_bins=8,
        max_target_positions=96,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        begin_suppress_tokens=None,
        suppress_tokens=None,
    )


def test_speech_models_decode_what_they_generate(whisper_config, monkeypatch):
    monkeypatch.setattr(decoding, "_GENERATED", 6)
    torch.manual_seed(0)
    model = WhisperForConditionalGeneration(whisper_config).train()
    clips = list(np.random.default_rng(0).normal(size=(4, 4000)).astype(np.float32))
    data = Dataset.from_dict({"audio": [{"array": clip, "sampling_rate": 16000} for clip in clips], "text": TEXTS[:4]})
    for source in (clips, data):
        prepared = read(model, source, PruneConfig(), WhisperFeatureExtractor(feature_size=8))
        batch = prepared.fit[0]
        assert batch["input_features"].shape[1:] == (8, 3000)
        assert 1 <= batch["decoder_input_ids"].shape[1] <= 8
        assert batch["decoder_attention_mask"].shape == batch["decoder_input_ids"].shape
        assert batch["decoder_attention_mask"][:, 0].all()
        assert model(**batch).loss is None
    assert model.training


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


# Speech encoders


@pytest.fixture(scope="module")
def wav2vec2():
    return Wav2Vec2Model(
        Wav2Vec2Config(
            **TEXT_MODEL, conv_dim=(8, 8), conv_kernel=(10, 3), conv_stride=(5, 2), num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2, num_feat_extract_layers=2, apply_spec_augment=False,
        )
    ).eval()  # fmt: skip


def test_waveforms_are_cut_to_the_shortest_so_that_nothing_is_padding(wav2vec2):
    clips = [np.ones(400 + 100 * i, dtype=np.float32) for i in range(6)]
    prepared = read(wav2vec2, clips, PruneConfig(), Wav2Vec2FeatureExtractor())
    assert all(set(batch) == {"input_values"} for batch in prepared.fit)
    assert min(batch["input_values"].shape[1] for batch in prepared.fit) in (400, 500)


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


def test_a_wrong_sampling_rate_is_refused(wav2vec2):
    data = [{"audio": {"array": np.zeros(800), "sampling_rate": 8000}}] * 4
    with pytest.raises(ValueError, match=r"8000 samples a second and the model takes 16000.*cast_column"):
        read(wav2vec2, data, PruneConfig(), Wav2Vec2FeatureExtractor())


# Real tokens


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


def test_rows_leave_padding_out_and_count_held_out_batches_last(bert, tokenizer):
    prepared = read(bert, TEXTS, PruneConfig(**SMALL), tokenizer)
    for index, batch in enumerate(prepared.fit + prepared.held_out):
        x = torch.randn(*batch["input_ids"].shape, 24)
        rows = prepared.rows(x, index, "encoder.layer.0.output.dense")
        assert torch.equal(rows, x[batch["attention_mask"].bool()])


# Streams


def flaky_stream(failures, after=3):
    """A dataset of 30 texts whose source breaks after each `after` items, so many times."""
    left = [failures]

    def rows():
        for i, text in enumerate(TEXTS):
            if left[0] and i % after == after - 1:
                left[0] -= 1
                raise ConnectionError("the line is down")
            yield {"text": text}

    return IterableDataset.from_generator(rows)


def test_a_flaky_source_is_tried_again(bert, tokenizer, monkeypatch):
    waits = []
    monkeypatch.setattr(calibration.time, "sleep", waits.append)
    steady = read(bert, flaky_stream(0), PruneConfig(**SMALL), tokenizer)
    prepared = read(bert, flaky_stream(2), PruneConfig(**SMALL), tokenizer)
    assert waits == [1.0, 2.0]
    for a, b in zip(steady.fit + steady.held_out, prepared.fit + prepared.held_out, strict=True):
        assert torch.equal(a["input_ids"], b["input_ids"])


def test_a_dead_source_is_given_up(bert, tokenizer, monkeypatch):
    monkeypatch.setattr(calibration.time, "sleep", lambda seconds: None)
    with pytest.raises(ConnectionError, match="the line is down"):
        read(bert, flaky_stream(100), PruneConfig(**SMALL), tokenizer)


def test_streams_stop_after_the_samples(bert, tokenizer):
    given = []

    def rows():
        for i in range(10_000):
            given.append(i)
            yield {"text": TEXTS[i % 30]}

    read(bert, IterableDataset.from_generator(rows), PruneConfig(**SMALL), tokenizer)
    assert len(given) <= 3 * 12


# All of the data, in order


def test_batch_all_keeps_the_order(bert, tokenizer):
    batches = list(batch_all(bert, TEXTS, tokenizer, batch_size=4))
    assert [len(b["input_ids"]) for b in batches] == [4] * 7 + [2]
    assert texts_of(batches, tokenizer) == TEXTS


def test_batch_all_refuses_a_blank_text(bert, tokenizer):
    with pytest.raises(ValueError, match="blank"):
        list(batch_all(bert, ["w1", " "], tokenizer))


# Some of the data, none of it held out


@pytest.mark.parametrize(("samples", "rows"), [(30, 30), (50, 30), (7, 7), (1, 1)])
def test_all_samples_that_are_asked_for_are_compared(bert, tokenizer, samples, rows):
    config = PruneConfig(samples=samples, batch_size=4)
    assert len(texts_of(batch_some(bert, TEXTS, config, tokenizer), tokenizer)) == rows
    ready = [{"input_ids": torch.full((6, 4), 3)} for _ in range(5)]
    assert sum(len(batch["input_ids"]) for batch in batch_some(bert, ready, config)) == rows
    ready = {"input_ids": torch.full((samples, 4), 3)}
    assert compare(bert, bert, ready, PruneConfig(samples=samples), tokenizer).drift.rows == 4 * samples


def test_blank_texts_cannot_be_compared_on(bert, tokenizer):
    with pytest.raises(ValueError, match=r"The data \(list of str\) holds no sample that is not blank"):
        batch_some(bert, ["", " "], PruneConfig(), tokenizer)


# Bad data


@pytest.mark.parametrize(
    ("data", "error", "said"),
    [
        ([], ValueError, r"The calibration data \(list\) is empty"),
        (Dataset.from_dict({"text": []}), ValueError, "is empty"),
        (TEXTS[:2], ValueError, r"at least 3 samples.*shrinkage='auto': 2 to fit on and 1 held out\. Found 2"),
        (["", "  ", *TEXTS[:2]], ValueError, "Found 2"),
        ([" ", ""], ValueError, "Found 0"),
        ("some text", TypeError, "Calibration data must be.*got str"),
        (7, TypeError, "got int"),
        (None, TypeError, "got NoneType"),
        ({"text": TEXTS}, TypeError, r"no tensors: .*Dataset\.from_dict\(data\).*found: 'text'"),
        ({"input_ids": [[3, 4]] * 8}, TypeError, "return_tensors='pt'.*found: 'input_ids'"),
        (pd.DataFrame({"n": [1, 2, 3]}), ValueError, "no text column.*Columns found: 'n'"),
        ([1, 2, 3], TypeError, "item of type int"),
        ([TEXTS, TEXTS], TypeError, "item of type list"),
        ([TEXTS[0], 3, 4, 5], TypeError, "item of type int"),
        (DatasetDict(train=Dataset.from_dict({"text": TEXTS})), TypeError, "one split, choose one of 'train'"),
        (Dataset.from_dict({"a": TEXTS, "b": TEXTS}), ValueError, "no text column.*'a' of type str, 'b' of"),
        (Dataset.from_dict({"n": [1, 2, 3]}), ValueError, r"no text column.*Columns found: 'n'"),
        ([{"text": [*TEXTS]}] * 3, ValueError, "no text column.*Columns found: 'text' of type list"),
        (Dataset.from_dict({"label": TEXTS}), ValueError, "no text column"),
        ([{"input_ids": torch.full((4, 4), 99)}], ValueError, r"token id 99, but BertModel embeds 43 tokens"),
        ([{"input_ids": torch.full((4, 4), -100)}], ValueError, "input_ids .* holds -100, but token ids are 0"),
        ([{"input_ids": torch.ones(4, 4)}], ValueError, "input_ids .* whole numbers.*found torch.float32"),
        ([[3, 4, 5]] * 4, TypeError, "item of type list.*{'input_ids': ids}"),
        (torch.full((4, 4), 3), TypeError, "item of type Tensor.*{'input_ids': ids}"),
        ([torch.full((4, 4), 3)] * 4, ValueError, "{'input_ids': ids}.*items are of type Tensor"),
        ([{"input_ids": torch.full((1, 4), 3)}, "text"], TypeError, "Ready batches must all be dicts of tensors"),
    ],
)
def test_bad_data_is_refused_with_what_was_found(bert, tokenizer, data, error, said):
    with pytest.raises(error, match=said):
        read(bert, data, PruneConfig(), tokenizer)


def test_a_fixed_shrinkage_needs_fewer_samples(bert, tokenizer):
    prepared = read(bert, TEXTS[:2], PruneConfig(shrinkage=0.1), tokenizer)
    assert (prepared.fit_samples, prepared.held_out_samples) == (1, 1)


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


def test_images_of_different_sizes_are_refused():
    model = ViTModel(ViTConfig(image_size=16, patch_size=8, **TEXT_MODEL)).eval()
    images = [Image.new("RGB", (16, 16 + i)) for i in range(6)]
    with pytest.raises(ValueError, match=r"pixel_values of one batch must have one shape.*resize to one size"):
        read(model, images, PruneConfig(), ViTImageProcessor(do_resize=False))
