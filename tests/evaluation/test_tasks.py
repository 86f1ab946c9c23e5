"""Tasks on tiny models: predictions in order, references from the data, figures with intervals."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import spearmanr
from speech import make_processor, sounds, tiny_whisper, write_sounds
from tiny import tiny
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    ViTForImageClassification,
    ViTImageProcessor,
    Wav2Vec2FeatureExtractor,
)

from hf_subprune.config import PruneConfig
from hf_subprune.data.reading import batch_all
from hf_subprune.evaluation.metrics import load_metric, word_errors
from hf_subprune.evaluation.scores import embed, perplexity
from hf_subprune.evaluation.tasks import TASKS, Trial, load_task

WORDS = ["the", "cat", "sat", "on", "a", "mat", "while", "two", "dogs", "ran"]
TEXTS = [" ".join(WORDS[i % 5 : i % 5 + 3 + i % 4]) for i in range(12)]


@pytest.fixture(scope="module")
def tokenizer():
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def other(model):
    """The model with one layer changed."""
    changed = type(model)(model.config).eval()
    changed.load_state_dict(model.state_dict())
    with torch.no_grad():
        for name, parameter in changed.named_parameters():
            if ".0." in name:
                parameter.mul_(0.2)
    return changed


def test_accuracy_of_a_classifier_by_number_and_by_name(tmp_path, tokenizer):
    model = tiny("bert")
    with torch.no_grad():
        classes = [int(model(**tokenizer(text, return_tensors="pt")).logits.argmax()) for text in TEXTS]
    names = [model.config.id2label[c] for c in classes]
    for labels in (classes, names):
        labels = [model.config.id2label[1 - classes[0]] if labels is names else 1 - classes[0], *labels[1:]]
        rows = [{"text": text, "label": label} for text, label in zip(TEXTS, labels, strict=True)]
        task = load_task("classification", write(tmp_path / "data.jsonl", rows), tokenizer, PruneConfig(batch_size=5))
        (metric,) = Trial(task, model).score(other(model), resamples=50)
        assert metric.value.before == pytest.approx(11 / 12)
        assert (metric.name, metric.task, metric.data, metric.samples) == (
            "accuracy", "text-classification", "data", 12,
        )  # fmt: skip
        assert metric.before_interval[0] < metric.value.before < metric.before_interval[1]
    rows[0]["label"] = "nonsense"
    with pytest.raises(ValueError, match="knows no class 'nonsense'"):
        Trial(load_task("classification", write(tmp_path / "data.jsonl", rows), tokenizer), model)


def test_another_metric_is_given_classes_and_labels(tmp_path, tokenizer):
    rows = [{"text": text, "mood": i % 2, "idx": i} for i, text in enumerate(TEXTS)]
    task = load_task("classification", write(tmp_path / "data.jsonl", rows), tokenizer, column="text", label="mood")
    trial = Trial(task, tiny("bert"), load_metric("sklearn.metrics:balanced_accuracy_score"))
    (metric,) = trial.score(tiny("bert"), resamples=20)
    assert metric.name == "balanced_accuracy_score"
    assert metric.value.before == metric.value.after
    assert metric.change_interval == (0, 0)


def test_classes_of_images_are_those_of_their_folders(tmp_path):
    for i, name in enumerate(("cats/a.png", "dogs/b.png", "dogs/c.png")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (16, 16), (90 * i, 0, 0)).save(tmp_path / name)
    processor = ViTImageProcessor(size={"height": 16, "width": 16})
    model = tiny("vit")
    assert isinstance(model, ViTForImageClassification)
    trial = Trial(load_task("classification", str(tmp_path), processor), model)
    assert trial.references.tolist() == [0, 1, 1]
    assert trial.hub_task == "image-classification"
    assert trial.before.shape == (3,)


def test_similarity_is_the_cosine_of_two_embeddings(tmp_path, tokenizer):
    rows = [{"one": TEXTS[i], "other": TEXTS[i - 1], "score": float(i % 5)} for i in range(12)]
    model = tiny("bert")
    task = load_task("sts", write(tmp_path / "data.jsonl", rows), tokenizer)
    first, second = (embed(model, batch_all(model, [row[k] for row in rows], tokenizer)) for k in ("one", "other"))
    (metric,) = Trial(task, model).score(other(model), resamples=50)
    expected = spearmanr((first * second).sum(1), [row["score"] for row in rows]).statistic
    assert metric.value.before == pytest.approx(expected)
    assert (metric.name, metric.task) == ("spearmanr", "sentence-similarity")
    assert task.inputs() == [row["one"] for row in rows] + [row["other"] for row in rows]
    with pytest.raises(ValueError, match="two columns of text, found 'one' in data"):
        load_task("sts", str(tmp_path / "data.jsonl"), tokenizer, column="one").inputs()


def test_perplexity_is_that_of_all_tokens(tmp_path, tokenizer):
    (tmp_path / "data.txt").write_text("\n\n".join(TEXTS) + "\n")  # with blank lines, which are passed over
    model = tiny("llama")
    task = load_task("perplexity", str(tmp_path / "data.txt"), tokenizer, PruneConfig(batch_size=4))
    (metric,) = Trial(task, model).score(other(model), resamples=50)
    assert metric.value.before == pytest.approx(perplexity(model, batch_all(model, TEXTS, tokenizer)))
    low, high = metric.before_interval
    assert 1 < low < metric.value.before < high
    assert math.isfinite(metric.value.after) and metric.value.after != metric.value.before
    with pytest.raises(ValueError, match="causal language model"):
        Trial(task, tiny("bert"))


def test_drift_of_embeddings_needs_no_labels(tmp_path, tokenizer):
    (tmp_path / "data.txt").write_text("\n".join(TEXTS))
    model = tiny("bert")
    (metric,) = Trial(load_task("embedding-drift", str(tmp_path / "data.txt"), tokenizer), model).score(other(model))
    assert metric.value.before == pytest.approx(1)
    assert metric.value.after < 0.999
    assert metric.after_interval[0] <= metric.value.after <= metric.after_interval[1]


def test_samples_are_drawn_at_random_and_the_same_every_time(tmp_path, tokenizer):
    source = write(tmp_path / "data.jsonl", [{"text": text, "label": i} for i, text in enumerate(TEXTS)])
    drawn = [[row["label"] for row in load_task("classification", source, tokenizer, samples=6).rows] for _ in "ab"]
    assert drawn[0] == drawn[1] != list(range(6))
    assert len(set(drawn[0])) == 6


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("sentiment", {}, "no task 'sentiment', choose one of 'classification'"),
        ("classification", {"label": "mood"}, "has no column 'mood', choose of 'text', 'kind'"),
        ("classification", {}, "no column named label, labels or score: name it"),
    ],
)
def test_what_the_data_lacks_is_said(tmp_path, tokenizer, name, options, said):
    source = write(tmp_path / "data.jsonl", [{"text": text, "kind": 0} for text in TEXTS])
    with pytest.raises(ValueError, match=said):
        Trial(load_task(name, source, tokenizer, column="text", **options), tiny("bert"))


def test_predictions_of_every_task_are_arrays_by_sample(tmp_path, tokenizer):
    rows = [{"text": text, "label": 0, "second": text} for text in TEXTS]
    source = write(tmp_path / "data.jsonl", rows)
    for name in TASKS.keys() - {"transcription"}:
        columns = "text,second" if name == "sts" else "text"
        model = tiny("llama" if name == "perplexity" else "bert")
        found = load_task(name, source, tokenizer, column=columns).predict(model)
        assert isinstance(found, np.ndarray) and len(found) == len(TEXTS)


def test_word_errors_are_of_what_is_said_whatever_its_length(tmp_path):
    model, processor = tiny_whisper(), make_processor()
    source = str(write_sounds(tmp_path / "spoken", sounds(4), ["ab", "c d", "e", "f"]))
    task = load_task("transcription", source, processor, PruneConfig(batch_size=3))
    said = task.predict(model)
    assert said.shape == (4,) and all(isinstance(text, str) for text in said)
    alone = load_task("transcription", source, processor, PruneConfig(batch_size=1))
    assert alone.predict(model).tolist() == said.tolist()
    assert [row["text"] for row in task.inputs()] == ["ab", "c d", "e", "f"] == task.references(model, said).tolist()
    trial = Trial(task, model)
    trial.references = said
    (metric,) = trial.score(model, resamples=20)
    assert (metric.value.before, metric.value.after, metric.change_interval) == (0, 0, (0, 0))
    assert metric.examples == tuple((text, text, text) for text in said)


def test_word_errors_leave_case_and_signs_out_of_account():
    predictions = np.array(["the cat sat!", "a dog", "", "Hello there, world"], dtype=object)
    references = np.array(["The cat sat.", "the dog ran", "one", "hello world"], dtype=object)
    assert [word_errors(*pair) for pair in zip(references, predictions, strict=True)] == [
        (0, 3),
        (2, 3),
        (1, 1),
        (1, 2),
    ]
    assert TASKS["transcription"].metric(predictions, references) == pytest.approx(4 / 9)


def test_frames_of_a_model_without_decoder_are_written_down_each_clip_whole(tmp_path):
    model = tiny("wav2vec2")
    tokenizer = make_processor().tokenizer
    processor = SimpleNamespace(feature_extractor=Wav2Vec2FeatureExtractor(), tokenizer=tokenizer)
    waves = sounds(3, longest=6000)
    rows = [{"audio": wave, "text": "a"} for wave in waves]
    task = TASKS["transcription"](rows, processor)
    with torch.no_grad():
        logits = [
            model(**processor.feature_extractor(wave, sampling_rate=16_000, return_tensors="pt")).logits[0]
            for wave in waves
        ]
    expected = [tokenizer.decode(one.argmax(1), skip_special_tokens=True).strip() for one in logits]
    assert task.predict(model).tolist() == expected


def test_what_writes_nothing_down_is_refused(tmp_path, tokenizer):
    source = write(tmp_path / "data.jsonl", [{"text": text} for text in TEXTS])
    with pytest.raises(ValueError, match=r"BertFor.* writes down no sound or image"):
        Trial(load_task("transcription", source, tokenizer), tiny("bert"))


@pytest.mark.parametrize(
    ("task", "labels", "said"),
    [
        ("classification", [-1] * 12, r"labels of data hold -1; BertFor\w+ has classes 0 to 1: .*hidden"),
        ("classification", [0, 1, 5] * 4, "hold 5"),
        ("classification", [None, 1] * 6, "6 of 12 samples of data have no value in column 'label'"),
        ("sts", [-1.0] * 12, "All scores of data are -1, .*hidden"),
    ],
)
def test_labels_that_say_nothing_are_refused(tmp_path, tokenizer, task, labels, said):
    names = ("one", "other") if task == "sts" else ("text",)
    rows = [{**dict.fromkeys(names, text), "label": label} for text, label in zip(TEXTS, labels, strict=True)]
    evaluated = load_task(task, write(tmp_path / "data.jsonl", rows), tokenizer)
    with pytest.raises(ValueError, match=said):
        Trial(evaluated, tiny("bert"))
