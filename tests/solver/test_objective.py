"""The objective against least squares on raw rows."""

import math

import pytest
import torch
from least_squares import explained, problem

from hf_subprune.solver.moments import MomentAccumulator
from hf_subprune.solver.objective import Objective, objective_of, regularise
from hf_subprune.solver.problem import Problem, columns_of
from hf_subprune.solver.settings import Settings


@pytest.mark.parametrize("c", [1, 3])
def test_the_objective_is_what_least_squares_explains(c):
    H, C, _, B, Y = problem(n=12)
    objective = Objective(H, C, torch.randperm(12, generator=torch.Generator().manual_seed(0)).view(-1, c))
    for units in (torch.tensor([1]), torch.tensor([0, 3]), torch.arange(objective.units)):
        columns = columns_of(units, objective.groups)
        assert objective.value(units) == pytest.approx(explained(B, Y, columns))
        assert torch.equal(objective.columns(units), columns) and columns.tolist() == sorted(columns.tolist())


def test_shrinkage_adds_rows_that_want_the_original_weights():
    *_, B, _ = problem(n=12)
    W = torch.randn(12, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    moments = MomentAccumulator(12, intercept=False)
    moments.update(B)
    root = torch.randn(3, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    ridge = math.sqrt(0.3 * float(B.square().sum(0).mean()))
    B = torch.cat([B, ridge * torch.eye(12, dtype=B.dtype)])
    for weighs in (torch.eye(3, dtype=B.dtype), root):
        Y = B @ W @ weighs
        H, C, t = regularise(moments.moments(W), W, 0.3, None if weighs is not root else root)
        torch.testing.assert_close(H, B.T @ B)
        torch.testing.assert_close(C, B.T @ Y)
        assert t == pytest.approx(float(Y.square().sum()))
    of_block = objective_of(Problem([moments.moments(W)], W, output_metric=root @ root.T), Settings(shrinkage=0.3))
    torch.testing.assert_close(of_block.C @ of_block.C.T, C @ C.T, rtol=1e-5, atol=1e-5 * float(C.square().max()))


def test_misuse_is_refused_with_what_was_found():
    H, C, *_ = problem()
    with pytest.raises(ValueError, match="share columns"):
        Objective(H, C, torch.tensor([[0, 1], [1, 2]]))
    with pytest.raises(ValueError, match="columns below 24"):
        Objective(H, C, torch.tensor([[0, 24]]))
    with pytest.raises(ValueError, match=r"H \(n, n\)"):
        Objective(H[:5], C)
    H[0, 0] = float("nan")
    with pytest.raises(ValueError, match="missing values"):
        Objective(H, C)
