import builtins
import io
import re

import numpy as np
import pytest
import soundfile
import torch
from datasets import Audio, Dataset
from speech import RATE, make_processor, sounds, tiny_whisper, write_sounds

from hf_subprune.config import PruneConfig
from hf_subprune.data.datafiles import load_data, load_mixture
from hf_subprune.data.reading import read
from hf_subprune.data.sounds import is_file, is_stored, is_waveform, undecoded, waveform

FEW = {"samples": 5, "held_out": 2, "batch_size": 3}


@pytest.fixture(scope="module")
def tone():
    return np.sin(np.arange(4000) * 0.05).astype(np.float32) / 2


def encoded(array, rate=RATE, kind="WAV"):
    file = io.BytesIO()
    soundfile.write(file, array, rate, format=kind)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["wav", "flac", "ogg", "mp3"])
def test_files_are_read_wherever_they_are(tmp_path, tone, kind):
    (tmp_path / f"a.{kind}").write_bytes(data := encoded(tone, kind=kind.upper()))
    path = tmp_path / f"a.{kind}"
    found = [waveform(form, RATE) for form in (path, str(path), data, {"bytes": data, "path": None}, {"path": path})]
    assert all(np.array_equal(one, found[0]) for one in found)
    assert found[0].dtype == np.float32
    common = min(len(tone), len(found[0]))
    assert np.abs(found[0][:common] - tone[:common]).mean() < 0.05  # lossy ones differ, at the edges most


def test_arrays_of_every_kind_are_one_waveform(tone):
    stereo = np.stack([tone, -tone / 2])
    whole = {kind: np.round(tone * np.iinfo(kind).max).astype(kind) for kind in (np.int16, np.int32)}
    offset = (np.round(tone * 127) + 128).astype(np.uint8)
    for form in (tone, torch.tensor(tone), tone.tolist(), {"array": tone.astype(np.float64), "sampling_rate": None}):
        assert np.allclose(waveform(form, RATE), tone)
    for array in (stereo, stereo.T):
        assert np.allclose(waveform({"array": array, "sampling_rate": RATE}, RATE), tone / 4)
    for array in (*whole.values(), offset):
        assert np.allclose(waveform({"array": array, "sampling_rate": RATE}, RATE), tone, atol=0.01)


def test_other_rates_are_resampled(tone):
    slow = np.sin(np.arange(2000) * 0.1).astype(np.float32) / 2  # the same tone, at half of the rate
    for form in ({"array": slow, "sampling_rate": RATE // 2}, encoded(slow, RATE // 2)):
        found = waveform(form, RATE)
        assert len(found) == 4000
        assert np.abs(found - tone)[200:-200].max() < 0.02


def test_missing_sounds_are_none_and_broken_ones_are_errors(tmp_path):
    assert waveform({"array": None, "sampling_rate": RATE}, RATE) is None
    assert waveform({"bytes": None, "path": None}, RATE) is None
    with pytest.raises(FileNotFoundError, match=r"no sound file .*gone\.wav"):
        waveform(tmp_path / "gone.wav", RATE)
    for array in (np.zeros(0), np.zeros((2, 2, 9))):
        with pytest.raises(ValueError, match="values by channels, found an array of shape"):
            waveform({"array": array, "sampling_rate": RATE}, RATE)
    with pytest.raises(ValueError, match="NaN"):
        waveform(np.array([0.1, np.nan]), RATE)


def test_sounds_are_told_from_other_values(tone):
    assert is_stored({"bytes": b"", "path": None}) and not is_stored({"role": "user"}) and not is_stored("a.wav")
    assert is_file("a/b.FLAC") and is_file(b"RIFF") and not is_file("a sentence.") and not is_file(3)
    assert is_waveform(tone) and is_waveform([0.5, 0.1]) and not is_waveform([1, 2]) and not is_waveform("a.wav")


def test_columns_of_a_dataset_need_no_torchcodec(tmp_path):
    waves = sounds(7)
    write_sounds(tmp_path, waves)
    model, processor = tiny_whisper(), make_processor()
    paths = [str(tmp_path / f"{number:03d}.wav") for number in range(7)]
    stored = Dataset.from_dict({"audio": paths}).cast_column("audio", Audio(sampling_rate=RATE))
    dicts = Dataset.from_dict({"speech": [{"array": wave, "sampling_rate": RATE} for wave in waves]})
    known = read(model, list(waves), PruneConfig(**FEW), processor)
    data = {
        "paths": paths,
        "column of paths": Dataset.from_dict({"file": paths}),
        "column of sound": stored,
        "stream of sound": load_data(str(tmp_path)),
        "column of bytes": Dataset.from_dict({"audio": [encoded(wave) for wave in waves]}),
        "column of dicts": dicts,
        "column of arrays": Dataset.from_dict({"speech": waves}),
        "with a column of numbers beside": dicts.add_column("speaker", [[0.1, 0.2]] * 7),
    }
    for name, some in data.items():
        prepared = read(model, some, PruneConfig(**FEW), processor)
        given, expected = (
            torch.cat([batch["input_features"] for batch in (*one.fit, *one.held_out)]) for one in (prepared, known)
        )
        distance = torch.cdist(given.flatten(1), expected.flatten(1)) / expected[0].norm()
        assert distance.amin(0).max() < 0.01 and distance.amin(1).max() < 0.01, name  # wav files hold 16 bits
    assert undecoded(stored).features["audio"].decode is False


def test_folders_of_sound_are_data_and_so_are_mixtures_of_them(tmp_path):
    write_sounds(tmp_path / "spoken", sounds(4), ["one", "two", "three", "four"])
    write_sounds(tmp_path / "labelled" / "yes", sounds(2))
    write_sounds(tmp_path / "labelled" / "no", sounds(2))
    assert [row["text"] for row in load_data(str(tmp_path / "spoken"))] == ["one", "two", "three", "four"]
    assert {tuple(row) for row in load_data(str(tmp_path / "labelled"))} == {("audio",)}
    assert {row["label"] for row in load_data(str(tmp_path / "labelled"), labels=True)} == {0, 1}
    mixture = load_mixture([str(tmp_path / "spoken"), f"{tmp_path / 'labelled'}=2"])
    assert all(is_file(row["audio"]) for row in mixture)


@pytest.mark.parametrize(("package", "wave"), [("soundfile", "path"), ("soxr", "array")])
def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch, tone, package, wave):
    soundfile.write(tmp_path / "a.wav", tone, RATE)
    row = {"path": {"path": tmp_path / "a.wav"}, "array": {"array": tone, "sampling_rate": 8000}}[wave]
    imported = builtins.__import__

    def missing(name, *args, **kwargs):
        if name == package:
            raise ImportError(name)
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match=rf"{package}.*{re.escape('hf_subprune[speech]')}"):
        read(tiny_whisper(), [{"audio": row}] * 4, PruneConfig(skip_unreadable=True), make_processor())


def test_a_file_that_is_no_sound_is_named(tmp_path):
    write_sounds(tmp_path, sounds(4))
    (tmp_path / "002.wav").write_bytes(b"no sound")
    with pytest.raises(ValueError, match=r"Sample \d of the data cannot be read: .*Mend it or leave it out"):
        read(tiny_whisper(), load_data(str(tmp_path)), PruneConfig(**FEW), make_processor())
