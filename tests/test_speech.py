"""A model that writes down speech, from a folder of sound to word errors."""

import json

import numpy as np
import pytest
import torch
from batches import rows
from command_line import run
from speech import RATE, make_processor, sounds, tiny_whisper, write_sounds
from transformers import WhisperForConditionalGeneration, pipeline

from hf_subprune import PruneConfig, PruneReport
from hf_subprune.collection.planning import plan
from hf_subprune.collection.walk import Walk
from hf_subprune.data.padding import spoken_frames
from hf_subprune.data.reading import read
from hf_subprune.discovery.discover import discover

FEW = {"samples": 6, "held_out": 2, "batch_size": 3}
TEXTS = ["a cat", "two dogs", "on the mat", "a dog ran", "it saw", "the cat sat", "and ran", "nobody saw it"]


def moments_of(model, data, processor=None):
    """By name, the moments of every block on some data."""
    samples = read(model, data, PruneConfig(**FEW), processor)
    blocks = discover(model, samples.probe).blocks
    parts = plan(samples, blocks)
    walk, found = Walk(samples, parts, {block.name: 0 for block in blocks}), {}
    for segment in walk.left:
        walk.start(segment)
        found |= walk.moments(segment.blocks)
        walk.finish(segment)
    return samples, found


def test_silence_behind_the_speech_changes_no_moments():
    model, processor = tiny_whisper(), make_processor()
    waves = sounds(8)
    longer = [np.concatenate([wave, np.zeros(400 * number, dtype=np.float32)]) for number, wave in enumerate(waves)]
    samples, known = moments_of(model, waves, processor)
    _, padded = moments_of(model, longer, processor)
    assert samples.description["padded"] > 0.5
    for name, moments in known.items():
        assert moments.rows < 6 * 50 if name.startswith("model.encoder") else moments.rows > 0
        others = (*padded[name].folds, padded[name].held_out)
        for one, other in zip((*moments.folds, moments.held_out), others, strict=True):
            assert one.rows == other.rows
            W = torch.eye(one.n)
            assert torch.equal(one.moments(W).H, other.moments(W).H), name
    spoken = rows(model, samples, "model.encoder.layers.1.fc2")
    mine = [fold.moments(torch.eye(56)) for fold in known["model.encoder.layers.1.mlp"].folds]
    assert sum(fold.rows for fold in mine) == len(spoken)


def test_batches_of_your_own_need_no_mask():
    model, processor = tiny_whisper(), make_processor()
    extractor = processor.feature_extractor
    given = extractor(sounds(8), sampling_rate=RATE, return_tensors="pt")["input_features"]
    ids = torch.randint(0, 250, (8, 5), generator=torch.Generator().manual_seed(0))
    batches = [{"input_features": given, "decoder_input_ids": ids}]
    samples, known = moments_of(model, batches)
    spoken = [int(frames) for batch in samples.fit for frames in spoken_frames(model, batch)[:, ::2].sum(1)]
    heard = sum(frames + (50 - frames) // 10 for frames in spoken)  # and a tenth of the silence
    for name, moments in known.items():
        assert moments.rows == (heard if name.startswith("model.encoder") else 6 * 5) < 6 * 50, name


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model with its processor, spoken sentences, and the model pruned on them."""
    place = tmp_path_factory.mktemp("speech")
    model, processor = tiny_whisper(), make_processor()
    for one in (model, processor):
        one.save_pretrained(place / "model")
    write_sounds(place / "spoken", sounds(8), TEXTS)
    return place


@pytest.mark.slow
def test_one_command_from_a_folder_of_sound_to_a_model_that_loads(folders, capfd):
    run(
        "prune", folders / "model", "--data", folders / "spoken", "--out", folders / "small", "--keep", 0.85,
        "--samples", 6, "--held-out", 2, "--batch-size", 3, "--quiet",
    )  # fmt: skip
    assert capfd.readouterr().err == ""
    report = PruneReport.load(folders / "small")
    assert (report.layout, report.data["fit_samples"]) == ("stock", 6)
    small, loading = WhisperForConditionalGeneration.from_pretrained(folders / "small", output_loading_info=True)
    assert small.num_parameters() == report.parameters.after < tiny_whisper().num_parameters()
    assert not any(loading.values())
    recognizer = pipeline("automatic-speech-recognition", model=str(folders / "small"), max_new_tokens=8)
    wave = sounds(1)[0]
    assert isinstance(recognizer({"raw": wave, "sampling_rate": RATE})["text"], str)

    extractor = make_processor().feature_extractor
    long = extractor(
        np.concatenate(sounds(8)), sampling_rate=RATE, truncation=False, padding="longest", return_tensors="pt",
        return_attention_mask=True,
    )  # fmt: skip
    heard = small.generate(**long, return_timestamps=True, return_segments=True, max_new_tokens=8)
    assert long["input_features"].shape[2] > 100 and heard["segments"][0][-1]["start"] >= 1

    printed = run(
        "evaluate", folders / "small", "--against", folders / "model", "--data", folders / "spoken", "--task",
        "transcription", "--save", "--quiet",
    )  # fmt: skip
    assert "automatic-speech-recognition on spoken" in printed and "nobody saw it" in printed
    (metric,) = PruneReport.load(folders / "small").metrics
    assert (metric.name, metric.samples, len(metric.examples)) == ("wer", 8, 8)
    assert metric.before_interval[0] <= metric.value.before <= metric.before_interval[1]
    page = (folders / "small" / "subprune_report.md").read_text(encoding="utf-8")
    assert "## spoken, side by side" in page and "| nobody saw it |" in page
    assert json.loads((folders / "small" / "subprune_report.json").read_text())["metrics"][0]["examples"]
