import copy

import torch
from batches import ready_batches
from tiny import tiny

from hf_subprune import PruneConfig
from hf_subprune.bench.budgets import bench_budgets, rank_correlation, table
from hf_subprune.report.tables import render


def test_the_bench_ranks_allocations_and_leaves_the_model_alone():
    model = tiny("llama")
    before = copy.deepcopy(model.state_dict())
    config = PruneConfig(samples=12, held_out=4)
    rows = bench_budgets(model, ready_batches(model), config, keeps=(0.6,), allocations=6)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [row["budget"] for row in rows] == ["uniform", "equal_loss", "global", *["random"] * 6]
    assert all(row["actual"] > 0 and row["predicted"] > 0 for row in rows)
    assert all(row["kept"] <= 0.6 + 1e-9 for row in rows[:3])
    assert all(abs(row["kept"] - row["keep"]) < 0.01 for row in rows[3:])
    assert -1 <= rank_correlation(rows) <= 1
    assert "over 6 random" in render(table(rows))


def test_the_bench_shows_what_becomes_of_embeddings():
    common = {"keep": 0.5, "kept": 0.5, "predicted": 0.2}
    rows = [
        {**common, "budget": "uniform", "actual": 0.3, "figures": {"embedding_cosine": 0.9}},
        {**common, "budget": "global", "actual": 0.27, "figures": {"embedding_cosine": 0.95}},
    ]
    line = next(line for line in render(table(rows)).splitlines() if "global" in line)
    assert "-10%" in line
    assert "-50%" in line
