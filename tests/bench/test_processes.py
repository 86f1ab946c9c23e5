import json

import pytest
from typer.testing import CliRunner

from hf_subprune.bench import processes
from hf_subprune.cli import app


@pytest.mark.slow
def test_the_bench_compares_processes(tmp_path, monkeypatch, forkserver):
    launch = processes.LaunchConfig
    monkeypatch.setattr(processes, "LaunchConfig", lambda **given: launch(**{**given, "start_method": "forkserver"}))
    sizes = ["--layers", "1", "--samples", "4", "--width", "16"]
    done = CliRunner().invoke(app, ["bench", "processes", *sizes, "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    rows = json.loads((tmp_path / "processes.json").read_text())
    assert [row["processes"] for row in rows] == [1, 2]
    assert rows[0]["speedup"] == 1
    for name in ("", "cpu_"):
        assert all(
            row[f"{name}seconds"] * row[f"{name}speedup"] == pytest.approx(rows[0][f"{name}seconds"]) for row in rows
        )
