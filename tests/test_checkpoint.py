import errno
import json
import os
import shutil
from dataclasses import replace
from unittest.mock import Mock

import psutil
import pytest
import torch
from batches import ready_batches
from runs_of import files
from safetensors import SafetensorError
from safetensors.torch import load_file
from tiny import tiny
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from hf_subprune import PruneConfig, PruneReport, prune, prune_checkpoint
from hf_subprune.cli import app
from hf_subprune.report.saving import save_pruned

QUICK = {"samples": 8, "held_out": 4, "batch_size": 4}
CONFIG = PruneConfig(**QUICK, keep=0.4)  # all blocks lose units: neither kind alone holds as many
LAYERS = {"gpt2": "n_layer"}

pytestmark = pytest.mark.usefixtures("without_plots")


def saved(family, folder, dtype=torch.float32, **overrides):
    """A checkpoint in several files, and batches for it."""
    model = tiny(family, **{LAYERS.get(family, "num_hidden_layers"): 2, **overrides}).to(dtype)
    model.save_pretrained(folder, max_shard_size="60KB")
    return ready_batches(model)


def expected_files(source, batches, config, folder, **options):
    model = AutoModelForCausalLM.from_pretrained(source).eval()
    report = prune(model, batches, config)
    save_pruned(folder, model, None, report, **options)
    return files(folder), report


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {}),
        ("llama", {"variant": "asym"}),
        ("llama", {"variant": "residual"}),
        ("llama", {"variant": "seq", "layout": "ragged", "budget": "uniform", "units": ("mlp",)}),
        ("gpt2", {"layout": "ragged"}),
        ("llama", {"layout": "ragged", "units": ("attention",)}),
        ("qwen2", {"importance": "wanda", "reweight": False}),
    ],
)
def test_the_files_are_those_of_pruning_in_memory(tmp_path, family, settings):
    batches = saved(family, tmp_path / "model", tie_word_embeddings=True)
    config = PruneConfig(**QUICK, **settings)
    expected, in_memory = expected_files(tmp_path / "model", batches, config, tmp_path / "a")
    report = prune_checkpoint(tmp_path / "model", batches, config, tmp_path / "b")
    found = files(tmp_path / "b")
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name] == expected[name], name
    assert [b.held_out_error for b in report.blocks] == pytest.approx([b.held_out_error for b in in_memory.blocks])
    assert report.drift == pytest.approx(in_memory.drift, rel=1e-5)
    assert report.parameters == in_memory.parameters
    assert report.latency is None
    assert PruneReport.load(tmp_path / "b") == report
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "model"]


def test_shards_are_no_larger_than_asked_for_and_have_an_index(tmp_path):
    batches = saved("llama", tmp_path / "model", tie_word_embeddings=True)
    prune_checkpoint(tmp_path / "model", batches, CONFIG, tmp_path / "out", max_shard_size="40KB")
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 1
    assert all(sum(t.nbytes for t in load_file(shard).values()) <= 40_000 for shard in shards)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    prune(model, batches, CONFIG)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(found[name], value) for name, value in model.state_dict().items())


def test_half_precision_checkpoints_give_the_same_files(tmp_path):
    batches = saved("llama", tmp_path / "model", torch.bfloat16)
    expected, _ = expected_files(tmp_path / "model", batches, CONFIG, tmp_path / "a")
    prune_checkpoint(tmp_path / "model", batches, CONFIG, tmp_path / "b")
    assert files(tmp_path / "b") == expected


class StoppedError(Exception):
    pass


@pytest.mark.parametrize("variant", ["layer", "residual"])
@pytest.mark.parametrize("solved", [0, 1, 3])
def test_a_stopped_run_goes_on_behind_the_last_finished_layer(tmp_path, computed, variant, solved):
    batches = saved("llama", tmp_path / "model")
    config = replace(CONFIG, variant=variant)
    prune_checkpoint(tmp_path / "model", batches, config, tmp_path / "a")
    whole = computed.start_anew()
    assert {"blocks", "original", "sensitivities", "curves"} <= set(whole)
    computed.stop_at_block(solved, StoppedError())
    with pytest.raises(StoppedError):
        prune_checkpoint(tmp_path / "model", batches, config, tmp_path / "b")
    assert not (tmp_path / "b").exists()
    *finished, _ = computed.start_anew()
    assert len(computed.of_blocks(finished)) == solved
    prune_checkpoint(tmp_path / "model", batches, config, tmp_path / "b")
    assert computed.names == computed.blocks  # nothing else a second time
    assert len(computed.blocks) == 4 - solved
    assert finished + computed.names == whole
    assert files(tmp_path / "a") == files(tmp_path / "b")


@pytest.fixture
def stopped(tmp_path, computed):
    """Batches of a run that ended with its first block."""
    batches = saved("llama", tmp_path / "model")
    computed.stop_at_block(0, StoppedError())
    with pytest.raises(StoppedError):
        prune_checkpoint(tmp_path / "model", batches, CONFIG, tmp_path / "out")
    computed.start_anew()
    return batches


def test_another_config_data_or_model_is_refused(tmp_path, stopped):
    batches = stopped
    with pytest.raises(ValueError, match=r"config keep: 0\.4 then, 0\.25 now"):
        prune_checkpoint(tmp_path / "model", batches, PruneConfig(**QUICK, keep=0.25), tmp_path / "out")
    other = [{**batch, "input_ids": batch["input_ids"].flip(0)} for batch in batches]
    with pytest.raises(ValueError, match=r"data sha256: .* then, .* now"):
        prune_checkpoint(tmp_path / "model", other, CONFIG, tmp_path / "out")
    saved("llama", tmp_path / "model", seed=1)
    with pytest.raises(ValueError, match=r"file model-0000\d-of-0000\d\.safetensors: '\w+' then, '\w+' now"):
        prune_checkpoint(tmp_path / "model", batches, CONFIG, tmp_path / "out")


def test_a_checkpoint_is_known_by_its_content(tmp_path, stopped, computed):
    shutil.copytree(tmp_path / "model", tmp_path / "copied")
    for shard in (tmp_path / "copied").iterdir():
        os.utime(shard, (1, 1))
    prune_checkpoint(tmp_path / "copied", stopped, CONFIG, tmp_path / "out")
    assert computed.names == computed.blocks  # it went on
    prune_checkpoint(tmp_path / "model", stopped, CONFIG, tmp_path / "again")
    assert files(tmp_path / "out") == files(tmp_path / "again")


def test_nothing_counts_without_the_file_that_says_which_run_it_is_of(tmp_path, stopped, computed):
    (tmp_path / ".out.partial" / "0" / "run.json").unlink()
    other = PruneConfig(**QUICK, keep=0.25)
    prune_checkpoint(tmp_path / "model", stopped, other, tmp_path / "out")
    prune_checkpoint(tmp_path / "model", stopped, other, tmp_path / "again")
    assert files(tmp_path / "out") == files(tmp_path / "again")


class Planted:
    def __reduce__(self):
        return (os.mkdir, ("planted",))


def test_nothing_is_unpickled(tmp_path, stopped, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / ".out.partial" / "0").rglob("*.pt"):
        torch.save(Planted(), path)
    with pytest.raises(
        ValueError, match=r"is not as it was written \(it names \w+\.mkdir, .* Remove .*\.out\.partial"
    ):
        prune_checkpoint(tmp_path / "model", stopped, CONFIG, tmp_path / "out")
    assert not (tmp_path / "planted").exists()


def test_what_another_user_made_is_not_read(tmp_path, stopped, monkeypatch):
    monkeypatch.setattr("os.getuid", lambda: os.stat(tmp_path).st_uid + 1)
    with pytest.raises(ValueError, match=r"\.out\.partial was not made by you"):
        prune_checkpoint(tmp_path / "model", stopped, CONFIG, tmp_path / "out")


@pytest.mark.parametrize("content", ["{}", "not JSON", '{"weight_map": []}'])
def test_an_index_that_names_nothing_is_named(tmp_path, content):
    batches = saved("llama", tmp_path / "model")
    (tmp_path / "model" / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=r"index\.json names no files of weights: .*'weight_map'.* Put the file back"):
        prune_checkpoint(tmp_path / "model", batches, CONFIG, tmp_path / "out")


def test_a_second_run_is_refused_and_the_first_goes_on(tmp_path, computed):
    batches, refused = saved("llama", tmp_path / "model"), []

    def start_another(name):
        if name.startswith("blocks/") and not refused:
            with pytest.raises(BlockingIOError, match=rf"Process {os.getpid()} on .* writes to .*out now") as error:
                prune_checkpoint(tmp_path / "model", batches, PruneConfig(**QUICK, keep=0.25), tmp_path / "out")
            refused.append(error)

    computed.before = start_another
    prune_checkpoint(tmp_path / "model", batches, CONFIG, tmp_path / "out")
    assert refused
    computed.start_anew()
    prune_checkpoint(tmp_path / "model", batches, CONFIG, tmp_path / "again")
    assert files(tmp_path / "out") == files(tmp_path / "again")


@pytest.mark.parametrize("damage", ["remove", "truncate"])
def test_a_damaged_checkpoint_is_named_and_the_run_goes_on_when_it_is_mended(tmp_path, stopped, damage):
    batches = stopped
    shard = sorted((tmp_path / "model").glob("*.safetensors"))[1]
    shutil.copy2(shard, tmp_path / "kept")
    if damage == "remove":
        shard.unlink()
    else:
        os.truncate(shard, 1000)
    with pytest.raises((FileNotFoundError, ValueError), match=shard.name):
        prune_checkpoint(tmp_path / "model", batches, CONFIG, tmp_path / "out")
    shutil.copy2(tmp_path / "kept", shard)
    prune_checkpoint(tmp_path / "model", batches, CONFIG, tmp_path / "out")
    prune_checkpoint(tmp_path / "model", batches, CONFIG, tmp_path / "again")
    assert files(tmp_path / "out") == files(tmp_path / "again")


@pytest.mark.parametrize("writer", ["save_file", "torch.save"])
def test_a_full_disk_loses_nothing(tmp_path, monkeypatch, writer):
    import hf_subprune.runs.durable as durable

    batches = saved("llama", tmp_path / "model")
    write, calls = (durable.save_file if writer == "save_file" else torch.save), []

    def full(*args, **kwargs):
        calls.append(1)
        if len(calls) == (4 if writer == "save_file" else 9):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(f"hf_subprune.runs.durable.{writer}", full)
        with pytest.raises(OSError, match=r"No space left.*Make room"):
            prune_checkpoint(tmp_path / "model", batches, replace(CONFIG, variant="seq"), tmp_path / "out")
    prune_checkpoint(tmp_path / "model", batches, replace(CONFIG, variant="seq"), tmp_path / "out")
    prune_checkpoint(tmp_path / "model", batches, replace(CONFIG, variant="seq"), tmp_path / "again")
    assert files(tmp_path / "out") == files(tmp_path / "again")


def test_a_disk_that_is_full_at_the_end_loses_nothing(tmp_path, monkeypatch, computed):
    batches = saved("llama", tmp_path / "model")
    full = SafetensorError("I/O error: No space left on device (os error 28)")
    with monkeypatch.context() as patched:
        patched.setattr("transformers.modeling_utils.safe_save_file", Mock(side_effect=full))
        with pytest.raises(OSError, match=r"out could not be written: .*No space left.*Make room"):
            prune_checkpoint(tmp_path / "model", batches, CONFIG, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert len(computed.of_blocks(computed.start_anew())) == 4
    prune_checkpoint(tmp_path / "model", batches, CONFIG, tmp_path / "out")
    assert not computed.names  # nothing a second time
    prune_checkpoint(tmp_path / "model", batches, CONFIG, tmp_path / "again")
    assert files(tmp_path / "out") == files(tmp_path / "again")


def test_a_file_that_goes_while_a_run_reads_it_is_named(tmp_path, computed):
    batches = saved("llama", tmp_path / "model")
    shards = sorted((tmp_path / "model").glob("*.safetensors"))

    def lose_files(name):
        if name.startswith("blocks/"):
            for shard in shards:
                shard.rename(tmp_path / shard.name)

    computed.before = lose_files
    with pytest.raises(OSError, match=r"cannot be read from the checkpoint any more: .*Put the file back"):
        prune_checkpoint(tmp_path / "model", batches, CONFIG, tmp_path / "out")
    computed.start_anew()
    for shard in shards:
        (tmp_path / shard.name).rename(shard)
    prune_checkpoint(tmp_path / "model", batches, CONFIG, tmp_path / "out")
    prune_checkpoint(tmp_path / "model", batches, CONFIG, tmp_path / "again")
    assert files(tmp_path / "out") == files(tmp_path / "again")


@pytest.mark.parametrize("name", ["intermediate_size", "num_attention_heads"])
def test_weights_of_other_widths_than_the_config_says_are_named(tmp_path, name):
    batches = saved("llama", tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    said = json.loads(config.read_text())
    config.write_text(json.dumps(said | {name: said[name] * 2}))
    with pytest.raises(
        OSError, match=r"^model\.layers\.0\..*weight has shape .* in the checkpoint, and .*config.json"
    ):
        prune_checkpoint(tmp_path / "model", batches, CONFIG, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_no_finished_layer_keeps_a_file_mapped(tmp_path, computed):
    def mapped():
        return [m.path for m in psutil.Process().memory_maps() if str(tmp_path) in m.path and "blocks" in m.path]

    batches, seen = saved("llama", tmp_path / "model", num_hidden_layers=3), []
    computed.before = lambda name: seen.append(len(mapped())) if name.startswith("blocks/") else None
    prune_checkpoint(tmp_path / "model", batches, CONFIG, tmp_path / "out")
    assert len(seen) >= 3  # once a layer
    assert max(seen) <= 2


def test_too_little_room_is_said_before_any_work(tmp_path, monkeypatch):
    batches = saved("llama", tmp_path / "model")
    monkeypatch.setattr(
        "hf_subprune.runs.durable.shutil.disk_usage", lambda _: shutil._ntuple_diskusage(2000, 1000, 1000)
    )
    monkeypatch.setattr("hf_subprune.checkpoint._load", None)
    with pytest.raises(OSError, match=r"pruned model can take up to .* are free"):
        prune_checkpoint(tmp_path / "model", batches, CONFIG, tmp_path / "out")


def test_latency_is_no_target_here(tmp_path):
    with pytest.raises(ValueError, match="Latency"):
        prune_checkpoint(tmp_path, [], PruneConfig(latency=0.5), tmp_path / "out")


def arguments(tmp_path, out):
    """The command line, on tokenized text."""
    texts = tmp_path / "texts.jsonl"
    if not texts.exists():
        ids = [ids.tolist() for batch in saved("llama", tmp_path / "model") for ids in batch["input_ids"]]
        texts.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in ids))
    data = ["--data", str(texts), "--out", str(out), "--samples", "12", "--held-out", "4", "--batch-size", "4"]
    return ["prune", str(tmp_path / "model"), *data, "--offload", "--max-shard-size", "40KB"]


def test_the_command_prunes_a_checkpoint(tmp_path):
    done = CliRunner().invoke(app, arguments(tmp_path, tmp_path / "out"))
    assert done.exit_code == 0, done.output
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert PruneReport.load(tmp_path / "out").command.startswith("hf-subprune")
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.fp16.safetensors"])
def test_weights_of_another_format_are_refused_with_how_to_convert_them(tmp_path, name):
    tiny("llama").save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "model" / name)
    with pytest.raises(
        FileNotFoundError, match=rf"weights in '{name}' and not in model\.safetensors.*save_pretrained"
    ):
        prune_checkpoint(tmp_path / "model", ready_batches(tiny("llama")), PruneConfig(**QUICK), tmp_path / "out")
