import json

import pytest
from command_line import WORDS, run
from rich.table import Table
from sample_report import make_report
from tiny import tiny
from transformers import AutoConfig, AutoModel
from typer.testing import CliRunner

from hf_subprune import PruneReport
from hf_subprune.bench import commands
from hf_subprune.cli import commands as cli
from hf_subprune.cli import output
from hf_subprune.coverage.tiny import tiny_model


def test_prune_then_report_evaluate_and_load(folder, texts, tmp_path):
    out = tmp_path / "out"
    printed = run(
        "prune", folder, "--data", texts, "--out", out, "--keep", "mlp=0.5,attention=0.75", "--samples", 24,
        "--held-out", 8, "--batch-size", 4, "--budget", "uniform", "--quiet",
    )  # fmt: skip
    assert "bert.encoder.layer.0.mlp" in printed
    report = PruneReport.load(out)
    assert {(b.kind, b.units_after) for b in report.blocks} == {("mlp", 28), ("attention", 3)}
    assert report.config["keep"] == {"mlp": 0.5, "attention": 0.75}
    assert AutoModel.from_pretrained(out).num_parameters() < tiny("bert").num_parameters()
    assert "bert.encoder.layer.0.mlp" in run("report", out)
    compared = run("evaluate", out, "--against", folder, "--data", texts, "--samples", 8, "--quiet")
    assert "kl" in compared
    assert "parameters" in compared


@pytest.mark.slow
def test_a_task_is_scored_before_and_after_and_kept_in_the_report_on_request(folder, tmp_path):
    data = tmp_path / "labelled.jsonl"
    rows = [{"text": " ".join(WORDS[i % 7 : i % 7 + 5]), "label": i % 2} for i in range(40)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out"
    run("prune", folder, "--data", data, "--out", out, "--samples", 24, "--held-out", 8, "--quiet")
    words = ["evaluate", out, "--against", folder, "--data", data, "--quiet", "--task", "classification"]
    printed = run(*words)
    assert "text-classification on labelled" in printed and "95% intervals" in printed and "40 samples" in printed
    assert PruneReport.load(out).metrics == ()
    run(*words, "--metric", "sklearn.metrics:f1_score", "--samples", 20, "--save")
    run(*words, "--save")
    run(*words, "--save")  # replaces the figures of the same name
    f1, accuracy = PruneReport.load(out).metrics
    assert (f1.name, f1.samples, accuracy.name, accuracy.samples) == ("f1_score", 20, "accuracy", 40)
    assert 0 <= accuracy.before_interval[0] <= accuracy.value.before <= accuracy.before_interval[1] <= 1
    assert "accuracy, labelled" in run("report", out)


@pytest.mark.slow
def test_a_mixture_of_experts_is_inspected_and_loses_neurons_and_experts(folder, texts, tmp_path):
    tiny_model("mixtral", "main").save_pretrained(folder)
    printed = run("inspect", folder)
    assert "model.layers.1.mlp.experts.*" in printed and "4 x 96" in printed
    out = tmp_path / "out"
    printed = run(
        "prune", folder, "--data", texts, "--out", out, "--units", "experts,mlp", "--keep", "experts=0.75,mlp=0.5",
        "--samples", 24, "--held-out", 8, "--batch-size", 4, "--quiet",
    )  # fmt: skip
    assert "model.layers.1.mlp.experts.*" in printed
    config = AutoConfig.from_pretrained(out)
    assert (config.num_local_experts, config.intermediate_size) == (3, 48)
    assert "kl" in run("evaluate", out, "--against", folder, "--data", texts, "--samples", 8, "--quiet")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--metric", "accuracy"), "belong to a task"),
        (("--save",), "belong to a task"),
        (("--task", "perplexity"), "causal language model"),
    ],
)
def test_a_task_that_cannot_be_done_is_refused(folder, texts, words, message):
    arguments = ["evaluate", str(folder), "--against", str(folder), "--data", str(texts), *words]
    result = CliRunner().invoke(cli.app, arguments)
    assert isinstance(result.exception, ValueError)
    assert message in str(result.exception)


def test_a_report_that_figures_cannot_be_added_to_is_refused_at_once(folder, texts, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "hf_subprune.data.datafiles.load_model", lambda *args, **kwargs: pytest.fail("A model was loaded.")
    )

    def refused(pruned):
        words = ["evaluate", pruned, "--against", folder, "--data", texts, "--task", "classification", "--save"]
        return str(CliRunner().invoke(cli.app, [str(word) for word in words]).exception)

    said = refused("user/none")
    assert said == "--save adds to the report in DIR, a local folder that `prune` wrote; got 'user/none'."
    assert f"No pruning report at {folder / 'subprune_report.json'}" in refused(folder)
    make_report().save(tmp_path / "out")
    monkeypatch.setattr("os.access", lambda *args: False)
    assert f"--save cannot write {tmp_path / 'out' / 'subprune_report.json'}" in refused(tmp_path / "out")


def test_inspect_lists_blocks_and_parameters(folder):
    printed = run("inspect", folder)
    assert "bert.encoder.layer.1.attention" in printed
    assert f"of {tiny('bert').num_parameters():,} parameters" in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--keep", "2"), "keep"),
        (
            ("--keep", "mlp=abc"),
            "--keep takes a fraction such as 0.5, or one for each kind of units, mlp=0.5,attention",
        ),
        (("--keep", '{"mlp": 0.5'), "--keep takes a fraction"),
        (("--keep", "half"), "--keep takes a fraction"),
        (("--exclude", "nothing"), "matches no block"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing_behind(folder, texts, tmp_path, monkeypatch, capsys, words, message):
    out = tmp_path / "out"
    arguments = ["hf-subprune", "prune", str(folder), "--data", str(texts), "--out", str(out), *words]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 1
    printed = " ".join(capsys.readouterr().err.split())
    assert message in printed
    assert "Traceback" not in printed
    assert not out.exists()


@pytest.mark.parametrize("keeps", [("0.5",), ("0.75", "0.5")])
def test_what_cannot_be_saved_is_refused_before_any_work(folder, texts, tmp_path, monkeypatch, keeps):
    monkeypatch.setattr(
        "hf_subprune.data.datafiles.load_model", lambda *args, **kwargs: pytest.fail("A model was loaded.")
    )
    out = tmp_path / "out"

    def refused(*words):
        arguments = ["prune", folder, "--data", texts, "--out", out, "--keep", *keeps, *words]
        return str(CliRunner().invoke(cli.app, [str(word) for word in arguments]).exception)

    assert "max_shard_size takes a size" in refused("--max-shard-size", "foo")
    assert "cannot be made" in refused("--out", texts / "out")
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    assert "was not written by hf_subprune" in refused()


def test_several_sizes_are_saved_in_shards(folder, texts, tmp_path):
    words = ["--samples", 24, "--held-out", 8, "--units", "mlp", "--max-shard-size", "50KB", "--quiet"]
    run("prune", folder, "--data", texts, "--out", tmp_path / "out", "--keep", 0.75, 0.5, *words)
    assert all(len(list((tmp_path / "out" / name).glob("*.safetensors"))) > 1 for name in ("keep-0.75", "keep-0.5"))


@pytest.mark.parametrize("name", ["missing[train].txt", "a[/red].txt", "a:cat:.txt"])
def test_brackets_in_a_message_are_no_markup(folder, tmp_path, monkeypatch, capsys, name):
    arguments = ["hf-subprune", "prune", str(folder), "--data", name, "--out", str(tmp_path / "out"), "--quiet"]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(SystemExit):
        cli.main()
    assert capsys.readouterr().err.strip() == f"Error: No file or folder {name}."


@pytest.mark.parametrize("console", [output.console(), commands.console])
def test_brackets_in_a_table_or_a_path_are_no_markup(console):
    table = Table(title="a[/red]")
    table.add_column("b[train]")
    table.add_row("c:cat:[/red]")
    with console.capture() as printed:
        console.print(table, "d[train]")
    assert all(part in printed.get() for part in ("a[/red]", "b[train]", "c:cat:[/red]", "d[train]"))


def test_a_folder_that_is_not_ours_is_left_alone(folder, texts, tmp_path):
    out = tmp_path / "precious"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    result = CliRunner().invoke(cli.app, ["prune", str(folder), "--data", str(texts), "--out", str(out)])
    assert isinstance(result.exception, ValueError)
    assert "was not written by hf_subprune" in str(result.exception)
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]


def test_a_language_model_is_pruned_without_data(folder, tmp_path):
    tiny("llama").save_pretrained(folder)
    words = ["--samples", 12, "--held-out", 4, "--batch-size", 4, "--max-length", 16, "--quiet"]
    run("prune", folder, "--data-free", "--out", tmp_path / "out", "--keep", 0.75, *words)
    report = PruneReport.load(tmp_path / "out")
    assert (report.data["fit_samples"], report.data["held_out_samples"]) == (12, 4)
    assert report.parameters.ratio < 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "Give --data DATA, or --data-free"),
        (("--data-free", "--data", "texts.txt"), "Give --data DATA, or --data-free"),
        (("--data-free", "--offload"), "leave --split, --column and --offload out"),
        (("--data-free",), "BertForSequenceClassification does not go on with text"),
    ],
)
def test_a_prune_without_data_or_with_both_is_refused(folder, tmp_path, words, message):
    result = CliRunner().invoke(cli.app, ["prune", str(folder), "--out", str(tmp_path / "out"), *words])
    assert isinstance(result.exception, ValueError) and message in str(result.exception)
