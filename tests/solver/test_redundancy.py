"""Dead units and copies: found, folded into what stays, and gone first."""

import pytest
import torch

from hf_subprune.solver.moments import MomentAccumulator
from hf_subprune.solver.problem import Problem
from hf_subprune.solver.redundancy import DEAD, redundancy
from hf_subprune.solver.settings import Settings
from hf_subprune.solver.solve import solve

N, M = 24, 6


def rows_of(count, n=N, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(n, n, generator=generator, dtype=torch.float64)
    return (torch.randn(count, n, generator=generator, dtype=torch.float64) @ mixing).relu()


def problem_of(B, intercept=True, groups=None, sets=1):
    W = torch.randn(B.shape[1], M, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    folds = []
    for part in B.chunk(2):
        accumulator = MomentAccumulator(B.shape[1], intercept=intercept)
        accumulator.update(part)
        folds.append(accumulator.moments(W))
    return Problem(folds, W, groups, sets=sets)


def test_ordinary_columns_are_left_as_they_are():
    problem = problem_of(rows_of(400))
    assert problem.redundancy.first.tolist() == list(range(N))
    assert len(problem.redundancy.columns) == 0
    assert problem.redundancy.folded(problem.W) is problem.W


@pytest.mark.parametrize("intercept", [True, False])
def test_dead_units_and_copies_are_found(intercept):
    B = rows_of(400)
    B[:, 5], B[:, 7], B[:, 9] = 0, -2 * B[:, 3], B[:, 7]
    found = problem_of(B, intercept).redundancy
    assert found.first[[3, 5, 7, 9]].tolist() == [3, DEAD, 3, 3]
    assert found.ratio[[7, 9]].tolist() == pytest.approx([-2, -2])


def test_a_constant_is_dead_where_a_bias_can_take_it_up():
    B = rows_of(400)
    B[:, 5] = 3.0
    assert problem_of(B, intercept=True).redundancy.first[5] == DEAD
    assert problem_of(B, intercept=False).redundancy.first[5] == 5


def test_few_rows_make_no_copies():
    assert problem_of(rows_of(8)).redundancy.first.tolist() == list(range(N))


@pytest.mark.parametrize("kept", [None, [9, 3], [9, 12], [12]])
def test_folded_weights_compute_the_same(kept):
    B = rows_of(400)
    B[:, 5], B[:, 7], B[:, 9] = 0, -2 * B[:, 3], 0.5 * B[:, 3]
    problem = problem_of(B)
    units = None if kept is None else torch.tensor(kept)
    folded = problem.redundancy.folded(problem.W, units)
    assert torch.allclose(B @ folded, B @ problem.W)
    heir = 9 if kept == [9, 12] or kept == [9, 3] else 3
    assert [i for i in range(N) if not folded[i].any()] == [i for i in (3, 5, 7, 9) if i != heir]


def test_copies_of_groups_are_copies_column_by_column_within_their_set():
    B = rows_of(400)
    B[:, 8:12] = B[:, 0:4]
    B[:, 20:24] = B[:, [1, 0, 2, 3]]  # others
    groups = torch.arange(N).view(-1, 4)
    assert problem_of(B, groups=groups).redundancy.first.tolist() == [0, 1, 0, 3, 4, 5]
    assert redundancy(problem_of(B).total(), groups, sets=3).first.tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("method", ["greedy", "backward"])
@pytest.mark.parametrize("shrinkage", ["auto", 0.1])
def test_they_go_first_and_nothing_is_lost(method, shrinkage):
    B = rows_of(1000)
    B[:, 12:20], B[:, 20:] = B[:, :8], 0
    solution = solve(problem_of(B), 12, Settings(method=method, shrinkage=shrinkage))
    kept = solution.kept_units.tolist()
    assert {unit - 12 if unit >= 12 else unit for unit in kept} == set(range(12))
    assert solution.fitted_error < 1e-9


def test_more_than_there_are_without_copies_can_be_kept():
    B = rows_of(1000)
    B[:, 12:] = B[:, :12]
    solution = solve(problem_of(B), 15, Settings())
    assert set(range(12)) == {unit % 12 for unit in solution.kept_units.tolist()}
    assert solution.fitted_error < 1e-9


def test_a_column_that_says_nothing_leaves_its_unit_as_it_is():
    B = rows_of(400)
    B[:, 3] = 0
    B[:, 4:8] = 2 * B[:, :4]
    problem = problem_of(B, groups=torch.arange(N).view(-1, 4))
    assert problem.redundancy.first.tolist() == [0, 0, 2, 3, 4, 5]
    folded = problem.redundancy.folded(problem.W)
    assert torch.allclose(B @ folded, B @ problem.W) and not folded[4:8].any()
