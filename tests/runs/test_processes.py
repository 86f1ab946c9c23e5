import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from batches import ready_batches
from forked import SERVERS
from launched import RUNS, pruned
from launched_checkpoint import VARIANTS, checkpoint_pruned
from runs_of import files
from tiny import tiny
from transformers import AutoModelForCausalLM

from hf_subprune import PruneReport
from hf_subprune.runs.durable import read_json
from hf_subprune.runs.processes import own_share
from hf_subprune.solver.moments import MomentAccumulator

HERE = Path(__file__).parents[1]


def launch(processes, *arguments):
    """As a user does; on CPUs, for which `accelerate launch` knows only this way."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes)]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    paths = [str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "1",
    }
    done = subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def server():
    return SERVERS["hf_subprune"]


@pytest.fixture(scope="module")
def alone():
    return {name: pruned(name) for name in RUNS}


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_together_do_what_one_does(tmp_path, alone, server, processes):
    assert server.run(HERE / "launched.py", tmp_path, processes=processes) == [0] * processes
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(processes)]
    for name, (expected, weights) in alone.items():
        report, found = ranks[0][name]
        for other_report, other in (rank[name] for rank in ranks[1:]):
            assert other_report == report
            assert all(torch.equal(other[key], value) for key, value in found.items())
        assert [b["kept_units"] for b in report["blocks"]] == [b["kept_units"] for b in expected["blocks"]]
        for mine, theirs in zip(report["blocks"], expected["blocks"], strict=True):
            assert (mine["shrinkage"] or 0) == pytest.approx(theirs["shrinkage"] or 0, rel=1e-4)
            assert mine["held_out_error"] == pytest.approx(theirs["held_out_error"], rel=1e-4)
        assert report["drift"] == pytest.approx(expected["drift"], rel=1e-3)
        for key, value in weights.items():
            torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_the_command_is_launched_in_two_processes(tmp_path):
    model = tiny("llama")
    model.save_pretrained(tmp_path / "model")
    ids = [ids.tolist() for batch in ready_batches(model) for ids in batch["input_ids"]]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in ids))
    data = ["--data", tmp_path / "texts.jsonl", "--samples", "12", "--held-out", "4", "--batch-size", "2"]
    printed = launch(2, "-m", "hf_subprune.cli", "prune", tmp_path / "model", *data, "--out", tmp_path / "out")
    assert printed.count("Saved to") == 1
    report = PruneReport.load(tmp_path / "out")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").num_parameters() == report.parameters.after


@pytest.mark.slow
def test_processes_prune_a_checkpoint_together_and_go_on_after_a_stop(tmp_path, server):
    tiny("llama").save_pretrained(tmp_path / "model", max_shard_size="60KB")
    script = HERE / "launched_checkpoint.py"
    assert server.run(script, tmp_path / "model", tmp_path / "whole", processes=2) == [0, 0]
    assert any(server.run(script, tmp_path / "model", tmp_path / "stopped", "stop", processes=2))
    partial = tmp_path / "stopped" / ".layer.partial"
    positions = [
        [state["position"] for state in read_json(path)]
        for path in sorted(partial.glob("*/batches-of-*/walk/state.json"))
    ]
    assert positions == [[1, 2], [1]]
    assert server.run(script, tmp_path / "model", tmp_path / "stopped", processes=2) == [0, 0]
    for variant in VARIANTS:
        expected = checkpoint_pruned(tmp_path / "model", tmp_path / "alone" / variant, variant)
        report = PruneReport.load(tmp_path / "whole" / variant)
        assert [b.kept_units for b in report.blocks] == [b.kept_units for b in expected.blocks]
        assert report.drift == pytest.approx(expected.drift, rel=1e-3)
        assert sorted(path.name for path in (tmp_path / "stopped").iterdir()) == sorted(VARIANTS)
        assert files(tmp_path / "stopped" / variant) == files(tmp_path / "whole" / variant)


@pytest.mark.parametrize("targets", [False, True])
def test_sums_can_be_recentred(targets):
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(50, width, generator=generator, dtype=torch.float64) + 3 for width in (6, 4))
    shift = torch.randn(6, generator=generator, dtype=torch.float64)
    plain, moved = (MomentAccumulator(6, 4 if targets else None, intercept=True) for _ in range(2))
    for accumulator in (plain, moved):
        for rows in (slice(0, 20), slice(20, 50)):
            accumulator.update(x[rows], y[rows] if targets else None)
    moved.recentre(shift)
    assert torch.equal(moved.shift, shift)
    W = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    expected, found = plain.moments(W), moved.moments(W)
    for name in ("H", "C", "input_mean", "target_mean"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name))
    assert found.t == pytest.approx(expected.t)


def test_one_process_runs_all_batches_and_several_share_them(monkeypatch):
    assert own_share(5) == [0, 1, 2, 3, 4]
    shares = []
    for rank in range(2):
        monkeypatch.setattr(
            "hf_subprune.runs.processes.PartialState",
            lambda cpu, rank=rank: type("", (), {"num_processes": 2, "process_index": rank}),
        )
        shares.append(own_share(5))
    assert shares == [[0, 2, 4], [1, 3]]
