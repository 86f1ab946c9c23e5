import pytest
import torch

from hf_subprune.solver.moments import MomentAccumulator
from hf_subprune.solver.problem import Problem, columns_of, metric_root


@pytest.mark.parametrize("groups", [None, torch.tensor([[3, 0], [1, 2]])])
def test_a_problem_knows_its_units_and_their_columns(groups):
    problem = Problem([], torch.zeros(4, 2), groups)
    assert problem.units == len(problem.columns) == (4 if groups is None else 2)
    assert columns_of(torch.tensor([0]), groups).tolist() == ([0] if groups is None else [0, 3])
    assert sorted(problem.columns.flatten().tolist()) == [0, 1, 2, 3]


def test_moments_of_all_rows_are_those_of_the_folds_together():
    W, folds = torch.ones(3, 2, dtype=torch.float64), []
    for rows in torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0)):
        accumulator = MomentAccumulator(3, intercept=False)
        accumulator.update(rows)
        folds.append(accumulator.moments(W))
    assert Problem(folds, W).total().rows == 10
    assert torch.equal(Problem(folds, W).total().H, folds[0].H + folds[1].H)
    assert Problem(folds[:1], W).total() is folds[0]


def test_the_root_of_a_metric_may_be_singular():
    M = torch.zeros(6, 6, dtype=torch.float64)
    M[2, 2] = 5.0
    root = metric_root(M)
    torch.testing.assert_close(root @ root.T, M, rtol=1e-4, atol=1e-4)
    assert Problem([], torch.zeros(4, 6)).metric_root() is None
    assert torch.equal(Problem([], torch.zeros(4, 6), output_metric=M).metric_root(), root)
