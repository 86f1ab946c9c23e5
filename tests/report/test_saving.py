import pytest
from batches import ready_batches
from tiny import tiny
from transformers import AutoModelForSequenceClassification

from hf_subprune import PruneConfig, PruneReport, prune
from hf_subprune.report.saving import check_output, check_shard_size, save_pruned


def pruned(**overrides):
    model = tiny("bert")
    settings = {"samples": 20, "held_out": 4, "batch_size": 4, "units": ("mlp",), **overrides}
    return model, prune(model, ready_batches(model), PruneConfig(**settings))


def test_a_result_replaces_an_earlier_one_of_ours(tmp_path):
    first, first_report = pruned(keep=0.75)
    second, second_report = pruned(keep=0.25)
    save_pruned(tmp_path / "out", first, None, first_report)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    (tmp_path / "out" / ".git").mkdir()
    save_pruned(tmp_path / "out", second, None, second_report)
    assert PruneReport.load(tmp_path / "out") == second_report
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert loaded.num_parameters() == second.num_parameters()
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine" and (tmp_path / "out" / ".git").is_dir()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failure_while_saving_leaves_the_earlier_result(tmp_path):
    first, first_report = pruned(keep=0.75)
    second, second_report = pruned(keep=0.25)
    save_pruned(tmp_path / "out", first, None, first_report)

    class Full:
        """A processor that finds no room, when the model is already there."""

        def save_pretrained(self, folder):
            raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space left"):
        save_pruned(tmp_path / "out", second, Full(), second_report)
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


def test_a_folder_that_cannot_be_made_is_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match=r"file/in/out cannot be made, .*file takes no new folder \(Not a directory\)"):
        check_output(tmp_path / "file" / "in" / "out")
    check_output(tmp_path / "deep" / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("size", ["foo", "5", "infGB", ""])
def test_what_is_no_size_of_a_shard_is_refused(size):
    with pytest.raises(ValueError, match=f"max_shard_size takes a size such as '2GB' or '500MB', got '{size}'"):
        check_shard_size(size)
    check_shard_size("1.5 MB")
    check_shard_size(1000)
