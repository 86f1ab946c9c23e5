from dataclasses import replace
from itertools import combinations, pairwise

import pytest
import torch

from hf_subprune.solver.curves import expected_loss, loss_curve, losses_of_sets
from hf_subprune.solver.moments import MomentAccumulator
from hf_subprune.solver.problem import Problem, columns_of
from hf_subprune.solver.reweighting import relative_error, reweight
from hf_subprune.solver.settings import Settings


def problem(rows=400, n=12, m=5):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    mixing, W, groups = draw(n, n), draw(n, m), torch.arange(n).view(-1, 2)
    folds = []
    for _ in range(2):
        accumulator = MomentAccumulator(n, intercept=True)
        accumulator.update(draw(rows, n) @ mixing + 1)
        folds.append(accumulator.moments(W))
    return Problem(folds, W, groups)


@pytest.mark.parametrize("weighed", [False, True])
def test_errors_are_those_of_fits_on_one_fold_corrected_for_fits_on_both(weighed):
    block = problem()
    folds, W, groups = block.folds, block.W, block.groups
    metric = torch.diag(torch.tensor([9.0, 1.0, 1.0, 0.0, 0.0], dtype=torch.float64)) if weighed else None
    curve = loss_curve(replace(block, output_metric=metric), Settings(shrinkage=0.3))
    assert [width for width, *_ in curve.errors] == [width for width, _ in curve.points[:-1]] == [0, 1, 2, 3, 4, 5]
    share = [fold.t / sum(fold.t for fold in folds) for fold in folds]
    for width, fitted, held_out in curve.errors:
        columns = columns_of(curve.order[:width].sort().values, groups)
        fits = [reweight(fold, W, columns, 0.3) for fold in folds]
        errors = [[relative_error(fold, columns, fit.V, fit.bias_shift) for fold in folds] for fit in fits]
        own = share[0] * errors[0][0] + share[1] * errors[1][1]
        other = share[1] * errors[0][1] + share[0] * errors[1][0]
        assert fitted == pytest.approx(0.75 * own + 0.25 * other)
        assert held_out == pytest.approx(0.25 * own + 0.75 * other)
    assert all(later < earlier for (_, earlier, _), (_, later, _) in pairwise(curve.errors)) or weighed


def test_points_are_weighed_errors_a_row_and_the_full_width_has_none():
    block = problem()
    alike = loss_curve(block, Settings())
    doubled = loss_curve(replace(block, output_metric=2 * torch.eye(5, dtype=torch.float64)), Settings())
    assert [p for _, p in doubled.points] == pytest.approx([2 * p for _, p in alike.points])
    assert [e for *_, e in doubled.errors] == pytest.approx([e for *_, e in alike.errors])
    energy, rows = sum(fold.t for fold in block.folds), sum(fold.rows for fold in block.folds)
    assert [p for _, p in alike.points[:-1]] == pytest.approx([e * energy / rows for *_, e in alike.errors])
    assert alike.points[-1] == (6, 0.0)


@pytest.mark.parametrize("reweight", [True, False])
def test_the_loss_of_some_columns_is_that_of_the_curve(reweight):
    block = replace(problem(), output_metric=torch.diag(torch.arange(5.0, dtype=torch.float64)))
    settings = Settings(reweight=reweight)
    curve = loss_curve(block, settings)
    for width, point in curve.points[:-1]:
        columns = columns_of(curve.order[:width].sort().values, block.groups)
        assert expected_loss(block, columns, settings) == pytest.approx(point)


def test_one_fold_has_fitted_errors_only():
    block = problem()
    curve = loss_curve(replace(block, folds=block.folds[:1]), Settings())
    assert all(fitted == held_out for _, fitted, held_out in curve.errors)


def test_trials_are_fits_on_the_first_fold_scored_on_the_other():
    block = problem()
    curve = loss_curve(block, Settings(shrinkage=0.0), trial_fractions=(0.5,))
    (trial,) = curve.trials.values()
    assert len(trial.kept) == 3
    other = block.folds[1]
    error = relative_error(other, columns_of(trial.kept, block.groups), trial.V, trial.bias_shift)
    assert trial.error == pytest.approx(error * other.t / other.rows)


def test_as_many_units_of_each_set_are_kept():
    block, settings = replace(problem(), sets=2), Settings(shrinkage=0.3)  # two sets of three units
    points = losses_of_sets(block, settings)
    assert [width for width, _ in points] == [2, 4]
    for width, loss in points:
        choices = [list(chosen) for chosen in combinations(range(6), width)]
        even = [units for units in choices if sum(unit < 3 for unit in units) == width // 2]
        possible = [expected_loss(block, columns_of(torch.tensor(u), block.groups), settings) for u in even]
        assert any(loss == pytest.approx(one) for one in possible)
        assert loss < sorted(possible)[len(possible) // 2]
