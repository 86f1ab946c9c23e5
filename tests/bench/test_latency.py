import json

import pytest
from command_line import run, save_encoder


def test_bench_latency_compares_the_speed_with_what_the_macs_promise(tmp_path):
    folder = save_encoder(tmp_path / "model")
    words = ["--batch-size", 2, "--length", 16, "--rounds", 2, "--out", tmp_path]
    printed = run("bench", "latency", folder, *words)
    assert "MACs promise" in printed
    rows = json.loads((tmp_path / "latency.json").read_text())
    assert [(row["layout"], row["round_to"]) for row in rows] == [("auto", None), ("ragged", None), ("ragged", 32)]
    assert all(row["promised"] > 1.2 and row["speedup"] > 0 for row in rows)
    assert rows[0]["share"] == pytest.approx(rows[0]["speedup"] / rows[0]["promised"])
