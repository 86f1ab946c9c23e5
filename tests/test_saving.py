import pytest
from batches import ready_batches
from tiny import tiny
from transformers import AutoModelForSequenceClassification

from hf_subprune import PruneConfig, PruneReport, prune
from hf_subprune.saving import check_output, save_pruned


def pruned(**overrides):
    model = tiny("bert")
    settings = {"samples": 20, "held_out": 4, "batch_size": 4, "units": ("mlp",), **overrides}
    return model, prune(model, ready_batches(model), PruneConfig(**settings))


def test_a_result_replaces_an_earlier_one_of_ours(tmp_path):
    first, first_report = pruned(keep=0.75)
    second, second_report = pruned(keep=0.25)
    save_pruned(tmp_path / "out", first, None, first_report)
    (tmp_path / "out" / "stale.txt").write_text("from the first run")
    save_pruned(tmp_path / "out", second, None, second_report)
    assert PruneReport.load(tmp_path / "out") == second_report
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert loaded.num_parameters() == second.num_parameters()
    assert not (tmp_path / "out" / "stale.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failure_while_saving_leaves_the_earlier_result(tmp_path, monkeypatch):
    first, first_report = pruned(keep=0.75)
    second, second_report = pruned(keep=0.25)
    save_pruned(tmp_path / "out", first, None, first_report)

    def full(*_args, **_kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(PruneReport, "save", full)
    with pytest.raises(OSError, match="No space left"):
        save_pruned(tmp_path / "out", second, None, second_report)
    assert PruneReport.load(tmp_path / "out") == first_report
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_files_are_no_output_folder(tmp_path):
    path = tmp_path / "file"
    path.write_text("x")
    with pytest.raises(ValueError, match="is a file"):
        check_output(path)
    check_output(tmp_path / "new")
    (tmp_path / "empty").mkdir()
    check_output(tmp_path / "empty")
