"""The tensor stages of one block, joined."""

import math
from dataclasses import replace

import pytest
import torch

from hf_subprune.solver.importance import IMPORTANCES
from hf_subprune.solver.moments import MomentAccumulator, combine
from hf_subprune.solver.problem import Problem
from hf_subprune.solver.reweighting import relative_error
from hf_subprune.solver.settings import Settings
from hf_subprune.solver.solve import Choice, choose, solve


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
    problem, settings = Problem(folds, W, groups), Settings(importance=importance)
    solution = solve(problem, k, settings)
    assert solution.kept_units.tolist() == sorted(set(solution.kept_units.tolist()))
    assert torch.equal(solution.kept_columns, groups[solution.kept_units].reshape(-1))
    assert solution.V.shape == (k * c, 6)
    total = combine(folds)
    error = relative_error(total, solution.kept_columns, solution.V, solution.bias_shift)
    assert solution.fitted_error == pytest.approx(error)
    plain = solve(problem, k, replace(settings, reweight=False))
    assert torch.equal(plain.kept_units, solution.kept_units)
    assert torch.equal(plain.V, W[plain.kept_columns])
    assert not plain.bias_shift.any()
    assert solution.fitted_error < plain.fitted_error
    assert (solution.guarantee is not None) == (importance == "greedy")


def test_selection_by_the_objective_beats_every_baseline():
    folds, W = folds_of()
    problem = Problem(folds, W, gradient=torch.rand(24))
    errors = {name: solve(problem, 8, Settings(importance=name, shrinkage=0.01)).fitted_error for name in IMPORTANCES}
    assert min(errors, key=errors.__getitem__) == "greedy"


def test_keeping_every_unit_changes_nothing():
    folds, W = folds_of()
    solution = solve(Problem(folds, W), 24, Settings())
    assert torch.equal(solution.V, W)
    assert not solution.bias_shift.any()
    assert solution.fitted_error == 0.0


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("settings", [Settings(), Settings(importance="wanda"), Settings(method="backward")])
def test_keeping_no_unit_leaves_the_mean_to_the_bias(intercept, settings):
    folds, W = folds_of(intercept=intercept)
    problem = Problem(folds, W, torch.arange(24).view(-1, 4))
    solution = solve(problem, 0, settings)
    assert solution.V.shape == (0, 6) and solution.kept_units.tolist() == solution.kept_columns.tolist() == []
    mean = combine(folds).input_mean @ W
    torch.testing.assert_close(solution.bias_shift, mean if intercept else torch.zeros_like(mean))
    assert solution.fitted_error == pytest.approx(1.0) and solution.guarantee == 1.0
    unmended = solve(problem, 0, replace(settings, reweight=False))
    assert not unmended.bias_shift.any()
    total = combine(folds)  # energies are centred where there is an intercept, and what is not mended is not
    lost = total.rows * float(mean.square().sum()) / total.t if intercept else 0.0
    assert unmended.fitted_error == pytest.approx(1.0 + lost)


@pytest.mark.parametrize("rows", [8, 12, 20])
def test_reweighting_helps_even_from_few_rows(rows):
    for seed in range(5):
        folds, W = folds_of(rows=rows, seed=seed)
        unseen, same = folds_of(rows=2000, seed=seed)
        assert torch.equal(W, same)
        errors = [
            relative_error(combine(unseen), s.kept_columns, s.V, s.bias_shift)
            for s in (solve(Problem(folds, W), 12, Settings(reweight=reweight)) for reweight in (True, False))
        ]
        assert errors[0] <= errors[1]


def test_one_fold_falls_back_to_a_fixed_shrinkage():
    folds, W = folds_of(count=1)
    solution = solve(Problem(folds, W), 12, Settings())
    assert 0 < solution.shrinkage < math.inf


def test_a_given_shrinkage_is_used_as_given():
    folds, W = folds_of()
    assert solve(Problem(folds, W), 12, Settings(shrinkage=0.7)).shrinkage == 0.7


def test_a_metric_weighs_outputs():
    folds, W = folds_of()
    M = torch.zeros(6, 6, dtype=torch.float64)
    M[2, 2] = 5.0
    weighed = solve(Problem(folds, W, output_metric=M), 4, Settings(shrinkage=0.01))
    plain = solve(Problem(folds, W), 4, Settings(shrinkage=0.01))
    total = combine(folds)

    def error_of_output(solution):
        X = solution.kept_columns
        residual = total.C[:, 2] @ W[:, 2] - 2 * total.C[X, 2] @ solution.V[:, 2]
        return float(residual + solution.V[:, 2] @ total.H[X][:, X] @ solution.V[:, 2])

    assert error_of_output(weighed) < error_of_output(plain)


@pytest.mark.parametrize("importance", ["greedy", "wanda"])
def test_units_chosen_elsewhere_are_kept_with_their_own_guarantee(importance):
    folds, W = folds_of()
    problem, settings = Problem(folds, W), Settings(importance=importance)
    given = Choice(torch.arange(10), "elsewhere, tied")
    solution = solve(problem, 10, settings, given)
    assert solution.kept_units.tolist() == list(range(10)) and solution.method == "elsewhere, tied"
    own = solve(problem, 10, settings)
    assert torch.equal(choose(problem, 10, settings).kept, own.kept_units)
    if importance == "greedy":
        assert 0 < solution.guarantee < own.guarantee <= 1
    else:
        assert solution.guarantee is None
    assert torch.equal(solve(problem, 10, settings, choose(problem, 10, settings)).V, own.V)


def test_misuse_is_refused():
    folds, W = folds_of()
    for k in (-1, 25):
        with pytest.raises(ValueError, match="0 to 24"):
            solve(Problem(folds, W), k, Settings())
    with pytest.raises(ValueError, match="Unknown importance"):
        solve(Problem(folds, W), 3, Settings(importance="magnitude"))
