"""The tensor stages of one block, joined."""

import math

import pytest
import torch

from hf_subprune.solver.importance import IMPORTANCES
from hf_subprune.solver.moments import MomentAccumulator, combine
from hf_subprune.solver.reweighting import relative_error
from hf_subprune.solver.solve import metric_root, solve_block


def folds_of(rows=400, n=24, m=6, count=2, intercept=True, seed=0):
    """Moments of parts of rows of correlated activations, and the weight."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(n // 2, n, generator=generator, dtype=torch.float64)
    W = torch.randn(n, m, generator=generator, dtype=torch.float64)
    B = torch.randn(rows, n // 2, generator=generator, dtype=torch.float64) @ mixing
    B = (B + torch.randn(rows, n, generator=generator, dtype=torch.float64)).relu()
    folds = []
    for part in B.chunk(count):
        accumulator = MomentAccumulator(n, intercept=intercept)
        accumulator.update(part)
        folds.append(accumulator.moments(W))
    return folds, W


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("c", [1, 4])
@pytest.mark.parametrize("importance", [name for name in IMPORTANCES if name != "activation_gradient"])
def test_a_block_is_solved_with_errors_that_hold(intercept, c, importance):
    folds, W = folds_of(intercept=intercept)
    groups = torch.arange(24).view(-1, c)
    k = len(groups) // 2
    solution = solve_block(
        folds, None, W, groups, k, importance=importance, generator=torch.Generator().manual_seed(0)
    )
    assert solution.kept_units.tolist() == sorted(set(solution.kept_units.tolist()))
    assert torch.equal(solution.kept_columns, groups[solution.kept_units].reshape(-1))
    assert solution.V.shape == (k * c, 6)
    total = combine(folds)
    error = relative_error(total, solution.kept_columns, solution.V, solution.bias_shift)
    assert solution.fitted_error == pytest.approx(error)
    plain = solve_block(
        folds,
        None,
        W,
        groups,
        k,
        importance=importance,
        reweight_kept=False,
        generator=torch.Generator().manual_seed(0),
    )
    assert torch.equal(plain.kept_units, solution.kept_units)
    assert torch.equal(plain.V, W[plain.kept_columns])
    assert not plain.bias_shift.any()
    assert solution.fitted_error < plain.fitted_error
    assert (solution.guarantee is not None) == (importance == "greedy")


def test_selection_by_the_objective_beats_every_baseline():
    folds, W = folds_of()
    errors = {
        name: solve_block(
            folds,
            None,
            W,
            None,
            8,
            importance=name,
            shrinkage=0.01,
            gradient=torch.rand(24),
            generator=torch.Generator().manual_seed(0),
        ).fitted_error
        for name in IMPORTANCES
    }
    assert min(errors, key=errors.__getitem__) == "greedy"


def test_keeping_every_unit_changes_nothing():
    folds, W = folds_of()
    solution = solve_block(folds, None, W, None, 24)
    assert torch.equal(solution.V, W)
    assert not solution.bias_shift.any()
    assert solution.fitted_error == 0.0


@pytest.mark.parametrize("rows", [8, 12, 20])
def test_reweighting_helps_even_from_few_rows(rows):
    for seed in range(5):
        folds, W = folds_of(rows=rows, seed=seed)
        unseen, same = folds_of(rows=2000, seed=seed)
        assert torch.equal(W, same)
        errors = [
            relative_error(combine(unseen), s.kept_columns, s.V, s.bias_shift)
            for s in (
                solve_block(folds, None, W, None, 12),
                solve_block(folds, None, W, None, 12, reweight_kept=False),
            )
        ]
        assert errors[0] <= errors[1]


def test_one_fold_falls_back_to_a_fixed_shrinkage():
    folds, W = folds_of(count=1)
    solution = solve_block(folds, None, W, None, 12)
    assert 0 < solution.shrinkage < math.inf


def test_a_given_shrinkage_is_used_as_given():
    folds, W = folds_of()
    assert solve_block(folds, None, W, None, 12, shrinkage=0.7).shrinkage == 0.7


def test_a_metric_weighs_outputs():
    folds, W = folds_of()
    M = torch.zeros(6, 6, dtype=torch.float64)
    M[2, 2] = 5.0
    root = metric_root(M)
    torch.testing.assert_close(root @ root.T, M, rtol=1e-4, atol=1e-4)
    weighed = solve_block(folds, None, W, None, 4, output_metric=M, shrinkage=0.01)
    plain = solve_block(folds, None, W, None, 4, shrinkage=0.01)
    total = combine(folds)

    def error_of_output(solution):
        X = solution.kept_columns
        residual = total.C[:, 2] @ W[:, 2] - 2 * total.C[X, 2] @ solution.V[:, 2]
        return float(residual + solution.V[:, 2] @ total.H[X][:, X] @ solution.V[:, 2])

    assert error_of_output(weighed) < error_of_output(plain)


def test_misuse_is_refused():
    folds, W = folds_of()
    for k in (0, 25):
        with pytest.raises(ValueError, match="1 to 24"):
            solve_block(folds, None, W, None, k)
    with pytest.raises(ValueError, match="Unknown importance"):
        solve_block(folds, None, W, None, 3, importance="magnitude")
