import json

import pytest
from batches import ready_batches
from sample_report import make_report
from tiny import tiny
from typer.testing import CliRunner

from hf_subprune import PruneConfig, PruneReport
from hf_subprune.cli import app
from hf_subprune.report.records import REPORT_NAME
from hf_subprune.report.tables import render
from hf_subprune.sizes import check_sizes, size_table


def test_sizes_can_be_read_at_80_columns():
    drift = {"rows": 247, "relative_error": 0.1234, "kl": 0.0123, "top1_agreement": 0.98765}
    reports = [
        make_report(drift=drift, config={"keep": 0.75}),
        make_report(drift=drift, config={"keep": {"mlp": 0.5, "attention": 0.75}}),
    ]
    text = render(size_table(reports), width=80)
    assert "…" not in text and "247" not in text
    whole = {"keep-0.75", "parameters", "MACs", "latency", "relative", "kl", "agreement", "2.000", "0.9877"}
    assert whole <= set(text.split())


def test_several_sizes_go_beside_earlier_ones_and_nothing_else(tmp_path):
    configs = [PruneConfig(keep=0.75), PruneConfig(keep=0.5)]
    folders = [tmp_path / "keep-0.75", tmp_path / "keep-0.5"]
    assert check_sizes(tmp_path, configs) == folders
    with pytest.raises(ValueError, match="Two of the sizes are the same"):
        check_sizes(tmp_path, [configs[0], configs[0]])
    (tmp_path / "notes.txt").write_text("years of work")
    with pytest.raises(ValueError, match="was not written by hf_subprune"):
        check_sizes(tmp_path, configs)
    (tmp_path / "notes.txt").rename(tmp_path / REPORT_NAME)
    with pytest.raises(ValueError, match="holds one pruned model: give another folder"):
        check_sizes(tmp_path, configs)
    (tmp_path / "keep-0.25").mkdir()
    (tmp_path / REPORT_NAME).rename(tmp_path / "keep-0.25" / REPORT_NAME)
    assert check_sizes(tmp_path, configs) == folders


def test_the_command_saves_every_size_in_its_own_folder(tmp_path):
    model = tiny("bert")
    folder, out, texts = tmp_path / "model", tmp_path / "out", tmp_path / "texts.jsonl"
    model.save_pretrained(folder)
    ids = [ids.tolist() for batch in ready_batches(model) for ids in batch["input_ids"]]
    texts.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in ids))
    arguments = ["prune", str(folder), "--data", str(texts), "--out", str(out), "--keep", "0.75", "0.5"]
    done = CliRunner().invoke(app, [*arguments, "--samples", "12", "--held-out", "4", "--layout", "ragged"])
    assert done.exit_code == 0, done.output
    sizes = [PruneReport.load(out / name).parameters.after for name in ("keep-0.75", "keep-0.5")]
    assert sizes[0] > sizes[1]
    assert "keep-0.75" in done.output
    assert (out / "sizes.png").is_file()
