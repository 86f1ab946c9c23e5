"""The solver's bench: complete rows of JSON, and yardsticks that compute what they claim."""

import json

import torch

from hf_subprune.bench.solver import bench_solver, rank_one_backward, synthetic_moments
from hf_subprune.solver.objective import Objective, regularise
from hf_subprune.solver.selection import backward


def test_every_method_has_a_row_and_refinement_never_loses():
    given = {"given": synthetic_moments(24, 6, seed=3)}
    rows = json.loads(json.dumps(bench_solver([(40, 8)], problems=given, keep=0.25, repeats=1)))
    assert {row["problem"] for row in rows} == {"synthetic 40x8", "alike 40x8", "given"}
    for problem in ("synthetic 40x8", "alike 40x8", "given"):
        error = {row["method"]: row["relative_error"] for row in rows if row["problem"] == problem}
        assert set(error) == {
            "greedy",
            "stochastic greedy",
            "backward",
            "greedy + swaps",
            "backward + swaps",
            "rank-one backward",
        }
        assert error["greedy + swaps"] <= error["greedy"] + 1e-9
        assert error["backward + swaps"] <= error["rank-one backward"] + 1e-6
        assert all(0 < value < 1 for value in error.values())
    assert all(row["seconds"] > 0 and row["ratio_to_cholesky"] > 0 for row in rows)
    assert {row["k"] for row in rows} == {10, 6}


def test_yardsticks_are_left_out_where_they_take_too_long():
    rows = bench_solver([(24, 6)], repeats=1, backward_below=23)
    assert {row["method"] for row in rows} == {"greedy", "greedy + swaps"}
    assert {row["speedup_over_rank_one"] for row in rows} == {None}


def test_rank_one_elimination_is_backward_elimination():
    moments, W = synthetic_moments(40, 8, dtype=torch.float64)
    H, C, _ = regularise(moments, W, 0.1)
    assert rank_one_backward(H, C, 25).tolist() == backward(Objective(H, C), 15).order[15:].flip(0).tolist()
