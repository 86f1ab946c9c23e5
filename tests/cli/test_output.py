"""What commands print, and when: through a pipe, and through a pseudo-terminal."""

import json
import os
import pty
import re
import select
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from command_line import run
from forked import SERVERS
from sample_report import make_block, make_report
from typer.testing import CliRunner

from hf_subprune import PruneReport
from hf_subprune.blocks import Refusal
from hf_subprune.cli import app, output
from hf_subprune.cli.commands import DEMO
from hf_subprune.report.tables import block_table, refusal_table
from hf_subprune.runs.stages import LOADING, OPENING, PRUNING, SAVING

# The demo on few paragraphs and another encoder, which is the first argument; it is found when the command imports it,
# which must not be before its first line.
COMMAND = """
import functools, os, pathlib, sys
os.environ |= {"COLUMNS": "100", "TERM": "xterm"}
encoder = pathlib.Path(sys.argv.pop(1))
from hf_subprune.storage.on_import import when_imported

def fewer():
    demo = sys.modules["hf_subprune.demo"]
    demo.demo_model_folder = lambda: encoder
    demo.run_demo = functools.partial(demo.run_demo, fitted=16, held_out=4, unseen=16)

when_imported("hf_subprune.demo", fewer)
from hf_subprune.cli import main
main()
"""
SMALL = ["--samples", "24", "--held-out", "8", "--batch-size", "4"]
LINE = re.compile(r"^\[(\d+)/(\d+)\] (.+?)(, |: |  )(.*)$", re.MULTILINE)


def words_of(command, folder, texts, out):
    """A command, the stages behind the imports, and what its result begins and ends with."""
    if command == "prune":
        stages = [OPENING, LOADING, *PRUNING, SAVING]
        return [command, folder, "--data", texts, "--out", out, *SMALL], stages, ("BertFor", "Saved to")
    if command == "evaluate":
        stages = ["Loading the original", "Loading the pruned model", OPENING, "Timing both", "Comparing outputs"]
        words = [command, folder, "--against", folder, "--data", texts, "--samples", "8"]
        return words, stages, ("Pruned against original", "Latency:")
    return [command], DEMO, ("BertModel pruned", "largest difference")


@pytest.mark.slow
@pytest.mark.parametrize("command", ["prune", "evaluate", "demo"])
def test_in_a_pipe_every_stage_is_a_line_on_standard_error_and_only_the_result_on_standard_output(
    folder, texts, tmp_path, command
):
    words, stages, (first, last) = words_of(command, folder, texts, tmp_path / "out")
    python = [sys.executable, "-X", "importtime", "-c", COMMAND, folder]
    done = subprocess.run([*python, *map(str, words)], capture_output=True, text=True, timeout=300)
    result, errors = done.stdout, done.stderr
    assert done.returncode == 0, errors
    said = "\n".join(line for line in errors.splitlines() if not line.startswith("import time:"))
    found = LINE.findall(said)
    announced = [name for _, _, name, sign, _ in found if sign == ", "]
    assert announced == [output.STARTING, *stages]
    assert {total for _, total, *_ in found} == {str(1 + len(stages))}
    assert [int(place) for place, _, _, sign, _ in found if sign == ", "] == list(range(1, 2 + len(stages)))
    assert all(re.search(r"time left not known yet|about [\d.]+ (s|min|h).* left", rest) for *_, rest in found)
    assert errors.index(f"] {output.STARTING}") < errors.index("| torch\n")
    assert len(said.splitlines()) == len(found), said  # libraries say nothing
    assert result.lstrip().startswith(first) and last in result.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("command", ["prune", "evaluate", "demo"])
def test_in_a_terminal_stages_come_in_order_and_the_result_behind_them(folder, texts, tmp_path, command):
    words, stages, (first, last) = words_of(command, folder, texts, tmp_path / "out")
    terminal, end = pty.openpty()
    name = os.ttyname(end)
    with ThreadPoolExecutor(1) as reader:
        reading = reader.submit(read_to_the_end, terminal)
        codes = SERVERS["hf_subprune"].run("-c", COMMAND, folder, *words, output=(name, name))
        os.close(end)
        printed = reading.result()
    assert codes == [0], printed
    places = [printed.index(f"[{place}/{1 + len(stages)}] {name}") for place, name in enumerate(stages, 2)]
    assert places == sorted(places)
    assert printed.index(f"[1/{1 + len(stages)}] {output.STARTING}") < places[0]
    assert re.search(r"about [\d.]+ (s|min).* left", printed)
    result = printed[printed.rindex(f"] {stages[-1]}") :]
    assert first in result and last in result.splitlines()[-1]


def read_to_the_end(terminal):
    """What is printed, without what moves the cursor or colours."""
    parts = []
    while select.select([terminal], [], [], 300)[0]:
        try:
            part = os.read(terminal, 65536)
        except OSError:  # on Linux, how a terminal says that nobody is at its other end
            break
        if not part:
            break
        parts.append(part)
    text = b"".join(parts).decode(errors="replace").replace("\r", "")
    return re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", text)


def test_one_object_of_json_is_all_that_is_printed(folder, texts, tmp_path):
    def printed(*words):
        result = CliRunner().invoke(app, [str(word) for word in words])
        assert result.exit_code == 0, (result.output, result.exception)
        return json.loads(result.stdout)

    out = tmp_path / "out"
    pruned = printed("prune", folder, "--data", texts, "--out", out, *SMALL, "--json")
    assert (pruned["folder"], pruned["pushed"]) == (str(out), None)
    assert PruneReport.load(out).parameters.after == pruned["parameters"]["after"]
    assert printed("report", out, "--json")["blocks"] == pruned["blocks"]
    assert printed("inspect", folder, "--json")["blocks"][0]["units"] > 0
    compared = printed("evaluate", out, "--against", folder, "--data", texts, "--samples", 8, "--json")
    assert compared["parameters"]["after"] == pruned["parameters"]["after"] and compared["metrics"] == []


def test_an_earlier_result_is_replaced_on_request_only(folder, texts, tmp_path):
    out = tmp_path / "out"
    words = ["prune", folder, "--data", texts, "--out", out, *SMALL, "--units", "mlp", "--quiet"]
    run(*words)
    before = (out / "subprune_report.json").read_bytes()
    refused = CliRunner().invoke(app, [str(word) for word in [*words, "--keep", 0.75]])
    assert isinstance(refused.exception, FileExistsError) and "--overwrite" in str(refused.exception)
    assert (out / "subprune_report.json").read_bytes() == before
    run(*words, "--keep", 0.75, "--overwrite")
    assert PruneReport.load(out).config["keep"] == 0.75


@pytest.mark.parametrize("words", [["--token", "hf_secret"], ["--token=hf_secret"]])
def test_a_token_does_not_get_into_the_report(monkeypatch, words):
    monkeypatch.setattr("sys.argv", ["hf-subprune", "prune", "model", *words, "--keep", "0.5"])
    assert "secret" not in output.command_line()
    assert output.command_line().endswith("--keep 0.5")


def test_the_page_of_a_report_is_opened(tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    make_report().save(tmp_path)
    assert "layer.0.mlp" in run("report", tmp_path, "--open")
    assert opened == [(tmp_path / "report.html").as_uri()]
    (tmp_path / "report.html").unlink()
    refused = CliRunner().invoke(app, ["report", str(tmp_path), "--open"])
    assert isinstance(refused.exception, FileNotFoundError)


def test_a_long_name_is_not_broken_in_a_narrow_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    name = "vision_language_model.vision_model.encoder.layers.11.self_attention"
    refusal = Refusal(name, "mlp", "a " * 99, "b")
    output.give(block_table(make_report(blocks=(make_block(name),))), refusal_table([refusal]))
    printed = capsys.readouterr().out
    assert printed.count(name) == 2 and "a a a" in printed


def test_an_error_is_one_line_in_a_pipe_however_long_it_is(capsys):
    def fail():
        raise ValueError("a/folder/with/a/long/name " * 9)

    with pytest.raises(SystemExit):
        output.reported(fail)
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_a_dry_run_says_what_a_run_would_do_and_leaves_nothing(folder, texts, tmp_path):
    words = ["prune", folder, "--data", texts, *SMALL, "--keep", 0.5, "--units", "mlp", "--dry-run"]
    printed = run(*words, "--quiet")
    assert "bert.encoder.layer.0.mlp" in printed and "of memory here" in printed
    foreseen = json.loads(CliRunner().invoke(app, [str(word) for word in [*words, "--json"]]).stdout)
    run(
        "prune", folder, "--data", texts, *SMALL, "--keep", 0.5, "--units", "mlp", "--out", tmp_path / "out", "--quiet"
    )
    report = PruneReport.load(tmp_path / "out")
    assert foreseen["parameters"]["before"] == report.parameters.before
    assert foreseen["parameters"]["after"] == pytest.approx(report.parameters.after, rel=0.01)
    assert all(seconds >= 0 for seconds in foreseen["seconds"].values()) and foreseen["memory"] > 0


@pytest.mark.parametrize("words", [["--offload"], ["--keep", 0.25]])
def test_a_dry_run_of_what_it_would_not_say_is_refused(folder, texts, words, capsys):
    asked = ["prune", folder, "--data", texts, "--keep", 0.5, "--dry-run", *words]
    result = CliRunner().invoke(app, [str(word) for word in asked])
    assert result.exit_code and "--dry-run" in str(result.exception or result.output)
