"""New weights against least squares on raw activations."""

import math

import pytest
import torch

from hf_subprune.solver.moments import MomentAccumulator, combine
from hf_subprune.solver.reweighting import (
    SHRINKAGE_GRID,
    cross_fit,
    relative_error,
    relative_error_of_rows,
    reweight,
    solve_normal_equations,
)


def activations(rows=300, n=16, m=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    B = torch.randn(rows, n, generator=generator, dtype=torch.float64) @ torch.randn(
        n, n, generator=generator, dtype=torch.float64
    )
    return B + 3.0, torch.randn(n, m, generator=generator, dtype=torch.float64)


def moments_of(B, W, intercept):
    accumulator = MomentAccumulator(B.shape[1], intercept=intercept)
    accumulator.update(B)
    return accumulator.moments(W)


COLUMNS = torch.tensor([0, 3, 4, 9, 15])


@pytest.mark.parametrize("intercept", [True, False])
def test_reweighting_is_least_squares_on_raw_rows(intercept):
    B, W = activations()
    new = reweight(moments_of(B, W, intercept), W, COLUMNS, 0.0)
    X = torch.cat([B[:, COLUMNS], torch.ones(len(B), int(intercept), dtype=B.dtype)], 1)
    expected = torch.linalg.lstsq(X, B @ W).solution
    torch.testing.assert_close(new.V, expected[:5])
    torch.testing.assert_close(new.bias_shift, expected[5] if intercept else torch.zeros(5, dtype=B.dtype))
    assert new.jitter == 0.0


def test_shrinkage_is_a_ridge_towards_the_original_weights():
    B, W = activations()
    moments = moments_of(B, W, intercept=False)
    ridge = math.sqrt(0.3 * float((B**2).sum(0).mean()))
    X = torch.cat([B[:, COLUMNS], ridge * torch.eye(16, dtype=B.dtype)[:, COLUMNS]])
    Y = torch.cat([B @ W, torch.zeros(16, 5, dtype=B.dtype)])
    Y[len(B) + COLUMNS] = ridge * W[COLUMNS]
    torch.testing.assert_close(reweight(moments, W, COLUMNS, 0.3).V, torch.linalg.lstsq(X, Y).solution)


def test_infinite_shrinkage_keeps_the_weights_and_moves_the_mean_into_the_bias():
    B, W = activations()
    moments = moments_of(B, W, intercept=True)
    new = reweight(moments, W, COLUMNS, math.inf)
    assert torch.equal(new.V, W[COLUMNS])
    torch.testing.assert_close(new.bias_shift, (B @ W - B[:, COLUMNS] @ W[COLUMNS]).mean(0))
    torch.testing.assert_close(new.V, reweight(moments, W, COLUMNS, 1e9).V, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("intercept", [True, False])
def test_relative_error_on_other_rows_counts_what_the_fitted_bias_leaves(intercept):
    B, W = activations()
    other = activations(seed=1)[0] + torch.linspace(0, 2, 16, dtype=torch.float64)
    new = reweight(moments_of(B, W, intercept), W, COLUMNS, 0.1)
    Y = other @ W
    residual = Y - other[:, COLUMNS] @ new.V - new.bias_shift
    scale = (Y - Y.mean(0)) if intercept else Y
    truth = float(residual.square().sum() / scale.square().sum())
    found = relative_error(moments_of(other, W, intercept), COLUMNS, new.V, new.bias_shift)
    assert found == pytest.approx(truth, rel=1e-9)


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("targets", [True, False])
def test_rows_say_the_relative_error_that_their_moments_say(intercept, targets):
    B, W = activations()
    new = reweight(moments_of(B, W, intercept), W, COLUMNS, 0.1)
    other = activations(rows=20, seed=1)[0]
    Y = (other + 0.5) @ W if targets else None
    held = MomentAccumulator(16, 5 if targets else None, intercept=intercept, keep_rows=True)
    for part in (slice(0, 12), slice(12, 20)):
        held.update(other[part], None if Y is None else Y[part])
        if part.start == 0:
            fit = (W, COLUMNS, new.V, new.bias_shift)
            found = relative_error_of_rows(held.kept_rows, held.shift, *fit)
            some, target = other[part], other[part] @ W if Y is None else Y[part]
            residual = target - some[:, COLUMNS] @ new.V - new.bias_shift
            truth = residual.square().sum() / (target - target.mean(0) * intercept).square().sum()
            assert found == pytest.approx(float(truth), rel=1e-9)
    assert held.kept_rows is None  # 20 rows take more memory than 16 columns of sums
    plain = MomentAccumulator(16, 5 if targets else None, intercept=intercept)
    plain.update(other, Y)
    torch.testing.assert_close(held.moments(W).H, plain.moments(W).H)
    torch.testing.assert_close(held.moments(W).C, plain.moments(W).C)


@pytest.mark.parametrize("keep_rows", [True, False])
def test_one_token_of_huge_energy_does_not_hide_what_becomes_of_the_others(keep_rows):
    B, W = activations(rows=12)
    B[0] *= 1000  # as that of a token that all attention rests on
    new = reweight(moments_of(activations(seed=1)[0], W, False), W, COLUMNS, 0.1)

    def error(some, weights=None):
        held = MomentAccumulator(16, intercept=False, keep_rows=keep_rows)
        held.update(some, None, weights)
        if keep_rows:
            return relative_error_of_rows(held.kept_rows, None, W, COLUMNS, new.V, new.bias_shift)
        return relative_error(held.moments(W), COLUMNS, new.V, new.bias_shift)

    energy = (B @ W).square().sum(1)
    of_each = torch.tensor([error(row[None]) for row in B])
    assert error(B) == pytest.approx(float(of_each[0]), rel=1e-3)
    assert error(B, 1 / energy) == pytest.approx(float(of_each.mean()), rel=1e-6)
    assert error(B[1:]) != pytest.approx(error(B), rel=0.1)


def left_out_errors(parts, W, columns, grid):
    """Relative errors of fits on all parts but one, on that one, at each lambda."""
    total = sum(part.t for part in parts)
    errors = torch.zeros(len(grid), dtype=torch.float64)
    for left_out, part in enumerate(parts):
        rest = combine([other for i, other in enumerate(parts) if i != left_out])
        for i, value in enumerate(grid):
            new = reweight(rest, W, columns, value)
            errors[i] += part.t / total * relative_error(part, columns, new.V, new.bias_shift)
    return errors


@pytest.mark.parametrize("outputs", [5, 2000])
def test_cross_fitting_scores_rows_left_out(outputs):
    B, W = activations(rows=60)
    W = W @ torch.randn(W.shape[1], outputs, generator=torch.Generator().manual_seed(0), dtype=W.dtype)
    parts = [moments_of(B[i::3], W, True) for i in range(3)]
    fit = cross_fit(parts, W, COLUMNS)
    errors = left_out_errors(parts, W, COLUMNS, fit.grid)
    expected = errors - errors.min()
    noise = 1e-6 if outputs == 5 else 0.25  # of very many outputs, 128 random combinations tell: sqrt(2 / 128) off
    assert fit.excess == pytest.approx(expected.tolist(), rel=0, abs=noise * float(expected.max()))
    best = fit.excess.index(0.0)
    assert fit.grid[best - 1] * 2 / 3 <= fit.shrinkage <= fit.grid[best + 1] * 2 / 3


def test_few_rows_want_more_shrinkage_than_many():
    B, W = activations(rows=4000, n=24)
    columns = torch.arange(0, 24, 2)
    chosen = []
    for parts in (B[:8], B[8:16]), (B[:2000], B[2000:]):
        folds = [moments_of(part, W, False) for part in parts]
        fit = cross_fit(folds, W, columns)
        chosen.append(fit.shrinkage)
        every = left_out_errors(folds, W, columns, SHRINKAGE_GRID)
        assert fit.grid[fit.excess.index(0.0)] == SHRINKAGE_GRID[int(every.argmin())]
    assert chosen[0] > chosen[1]


def paired_moments(B, Y, intercept=True):
    accumulator = MomentAccumulator(B.shape[1], Y.shape[1], intercept=intercept)
    accumulator.update(B, Y)
    return accumulator.moments()


@pytest.mark.parametrize("intercept", [True, False])
def test_of_what_the_target_asks_for_beyond_the_removed_columns_that_counts_which_holds_for_other_rows(intercept):
    B, W = activations(rows=4000)
    generator = torch.Generator().manual_seed(1)
    noise = 30 * torch.randn(len(B), W.shape[1], generator=generator, dtype=B.dtype)
    change = torch.randn(W.shape, generator=generator, dtype=B.dtype)

    def fitted(Y, rows):
        return cross_fit([paired_moments(B[i:rows:2], Y[i:rows:2], intercept) for i in range(2)], W, COLUMNS)

    assert fitted(B @ W, 40).mending == 1  # there is nothing to mend
    assert fitted(B @ (W + change), 60).mending > 0.95
    assert fitted(B @ W + noise, 60).mending < 0.1
    assert fitted(B @ W + noise, 4000).mending < 0.5  # however many rows there are
    assert fitted(B @ (W + change) + noise / 30, 4000).mending > 0.95
    Y = B @ (W + change) + noise
    some = fitted(Y, 60)
    folds = [paired_moments(B[i:60:2], Y[i:60:2], intercept) for i in range(2)]

    def left_out(mending):
        value = some.grid[some.excess.index(0.0)]
        news = [reweight(rest, W, COLUMNS, value, mending) for rest in folds]
        pairs = zip(folds, reversed(news), strict=True)
        return sum(fold.t * relative_error(fold, COLUMNS, new.V, new.bias_shift) for fold, new in pairs)

    assert 0 < some.mending < 1
    assert all(left_out(some.mending) < left_out(other) for other in (0, 1, some.mending + 0.05, some.mending - 0.05))


def test_cross_fitting_needs_two_folds():
    B, W = activations()
    with pytest.raises(ValueError, match="two or more folds"):
        cross_fit([moments_of(B, W, True)], W, COLUMNS)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_dependent_and_dead_columns_are_solved_with_a_recorded_jitter(dtype):
    B, W = activations()
    B[:, 4] = B[:, 3]
    B[:, 9] = 0
    H, C = (B.T @ B).to(dtype), (B.T @ (B @ W)).to(dtype)
    V, jitter = solve_normal_equations(H[COLUMNS][:, COLUMNS], C[COLUMNS])
    assert 0 < jitter < 1e-3
    assert float(V[3].abs().max()) == 0.0
    best = torch.linalg.lstsq(B[:, [0, 3, 15]], B @ W).solution
    torch.testing.assert_close(B[:, COLUMNS] @ V.double(), B[:, [0, 3, 15]] @ best, rtol=1e-2, atol=1e-1)


def test_scales_do_not_matter():
    B, W = activations()
    scale = torch.logspace(-6, 6, 16, dtype=torch.float64)
    plain = reweight(moments_of(B, W, False), W, COLUMNS, 0.0).V
    scaled = reweight(moments_of(B * scale, W / scale[:, None], False), W / scale[:, None], COLUMNS, 0.0).V
    torch.testing.assert_close(scaled * scale[COLUMNS, None], plain)


def test_failures_are_errors_and_never_the_identity():
    with pytest.raises(RuntimeError, match="not positive semi-definite"):
        solve_normal_equations(torch.tensor([[1.0, 2.0], [2.0, 1.0]]), torch.ones(2, 1))
    with pytest.raises(RuntimeError, match="not finite"):
        solve_normal_equations(torch.eye(2), torch.tensor([[float("nan")], [1.0]]))
    with pytest.raises(RuntimeError, match="negative diagonal"):
        solve_normal_equations(-torch.eye(2), torch.ones(2, 1))


def test_the_grid_holds_the_extremes():
    assert {1e-4, 1.0, math.inf} <= set(SHRINKAGE_GRID)
