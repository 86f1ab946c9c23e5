import json

import pytest
import torch
from batches import ready_batches
from fresh import run_fresh
from tiny import tiny
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

from hf_subprune import PruneConfig, PruneReport, prune, prune_sizes
from hf_subprune.models.running import call
from hf_subprune.report.card import may_write_card
from hf_subprune.report.saving import check_output, check_shard_size, save_pruned


def pruned(**overrides):
    model = tiny("bert")
    settings = {"samples": 12, "held_out": 4, "batch_size": 4, "units": ("mlp",), **overrides}
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


@pytest.mark.parametrize("layout", ["stock", "ragged"])
def test_save_pretrained_writes_the_report_and_the_card_and_all_that_loading_takes(layout, tmp_path):
    model, report = pruned(layout=layout)
    model.save_pretrained(tmp_path)
    assert PruneReport.load(tmp_path) == report
    card = (tmp_path / "README.md").read_text()
    assert f'from_pretrained("{tmp_path.name}")' in card and "## Before and after" in card
    assert ("trust_remote_code=True" in card) == (layout == "ragged")
    config = json.loads((tmp_path / "config.json").read_text())
    assert (tmp_path / "modeling_subprune.py").exists() == ("auto_map" in config) == (layout == "ragged")


def test_a_model_that_was_loaded_is_saved_with_its_code_and_without_a_report(tmp_path):
    pruned(layout="ragged")[0].save_pretrained(tmp_path / "first")
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    names = {path.name for path in (tmp_path / "second").iterdir()}
    assert names == {"config.json", "model.safetensors", "modeling_subprune.py"}


def test_a_card_of_ones_own_stays(tmp_path, without_plots):
    model, report = pruned()
    model.save_pretrained(tmp_path / "out")
    assert may_write_card(tmp_path / "out")
    card = tmp_path / "out" / "README.md"
    card.write_text(card.read_text().replace("## Limits", "## My limits"))
    assert not may_write_card(tmp_path / "out")
    before = card.read_text()
    model.save_pretrained(tmp_path / "out")
    assert card.read_text() == before
    save_pruned(tmp_path / "out", model, None, report)
    assert card.read_text() == before


def test_each_size_is_saved_with_its_own_report_and_the_model_has_none_in_the_end(tmp_path):
    model = tiny("bert")
    configs = [PruneConfig(keep=keep, samples=12, held_out=4, batch_size=4, units=("mlp",)) for keep in (0.75, 0.5)]
    for number, report in enumerate(prune_sizes(model, ready_batches(model), configs)):
        model.save_pretrained(tmp_path / str(number))
        assert PruneReport.load(tmp_path / str(number)) == report
    model.save_pretrained(tmp_path / "whole")
    assert not (tmp_path / "whole" / "README.md").exists()


def test_what_the_trainer_saves_loads_where_hf_subprune_is_not_installed(tmp_path, monkeypatch):
    model, _ = pruned(layout="ragged")
    batch = ready_batches(model)[0]
    settings = TrainingArguments(tmp_path / "run", report_to=[], use_cpu=True)
    Trainer(model, settings).save_model(tmp_path / "saved")
    torch.save([batch, call(model.eval(), batch).logits], tmp_path / "call.pt")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    script = """
        import json, sys
        sys.modules["hf_subprune"] = None
        import torch
        from transformers import AutoModelForSequenceClassification
        model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
        batch, expected = torch.load(sys.argv[2])
        with torch.no_grad():
            print(json.dumps((model(**batch).logits - expected).abs().max().item()))
        """
    difference, _ = run_fresh(script, tmp_path / "saved", tmp_path / "call.pt")
    assert difference < 1e-5
