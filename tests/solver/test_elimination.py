"""Panels of pivots against one pivot at a time."""

import pytest
import torch
from least_squares import problem

from hf_subprune.bench.solver import synthetic_moments
from hf_subprune.solver.elimination import eliminate
from hf_subprune.solver.objective import Objective, regularise
from hf_subprune.solver.settings import Tuning


@pytest.mark.parametrize("smallest", [False, True])
@pytest.mark.parametrize(("panel", "pool"), [(16, 1), (16, 2), (8, 4)])
def test_speculated_panels_agree_with_one_pivot_at_a_time(smallest, panel, pool):
    H, C, _, _, _ = problem(n=150, m=10, rows=400)
    if smallest:
        C = torch.linalg.solve(H, C)
        H = torch.linalg.inv(H)
    one, many = Tuning(panel=1), Tuning(panel=panel, first_pool=panel, pool=pool)
    reference, gains = eliminate(H, C, 120, dtype=torch.float64, smallest=smallest, tuning=one)
    order, fast = eliminate(H, C, 120, dtype=torch.float64, smallest=smallest, tuning=many)
    assert order.tolist() == reference.tolist()
    torch.testing.assert_close(fast, gains)


@pytest.mark.parametrize("smallest", [False, True])
@pytest.mark.parametrize("panel", [1, 7, 64])
def test_among_all_columns_pivots_are_those_of_one_at_a_time(smallest, panel):
    H, C, _, _, _ = problem(n=150, m=10, rows=400)
    if smallest:
        C = torch.linalg.solve(H, C)
        H = torch.linalg.inv(H)
    one, whole = Tuning(panel=1, whole=2.0), Tuning(whole=0.0, whole_panel=panel)
    reference, gains = eliminate(H, C, 140, dtype=torch.float64, smallest=smallest, tuning=one)
    order, fast = eliminate(H, C, 140, dtype=torch.float64, smallest=smallest, tuning=whole)
    assert order.tolist() == reference.tolist()
    torch.testing.assert_close(fast, gains, rtol=1e-6, atol=1e-9 * float(gains[0]))


def test_dead_and_equal_columns_come_last_among_all_columns():
    H, C, _, _, _ = problem(n=60, m=6, rows=200)
    H[50:], H[:, 50:], C[50:] = 0, 0, 0
    H[45:50], C[45:50] = H[40:45], C[40:45]
    H[:, 45:50] = H[:, 40:45]
    scale = H.diagonal().clamp_min(1.0).rsqrt()  # what is exhausted is told of columns with a diagonal near one
    order, gains = eliminate(H, C, 60, dtype=torch.float64, scale=scale, tuning=Tuning(whole=0.0, whole_panel=8))
    assert sorted(order.tolist()) == list(range(60))
    assert all((i in order[:45].tolist()) != (i + 5 in order[:45].tolist()) for i in range(40, 45))
    assert float(gains[45:].abs().max()) <= 1e-9 * float(gains[0])


def test_close_gains_have_the_order_of_float64_among_all_columns():
    moments, W = synthetic_moments(300, 40, alike=True, dtype=torch.float64)
    H, C, _ = regularise(moments, W, 0.1)
    reference, expected = eliminate(H, C, 150, dtype=torch.float64, tuning=Tuning(panel=1, whole=2.0))
    order, gains = eliminate(H.float(), C.float(), 150, dtype=torch.float32, tuning=Tuning(whole=0.0))
    F = Objective(H, C)
    assert F.value(order) == pytest.approx(F.value(reference), rel=1e-4)
    assert float(gains.sum()) == pytest.approx(float(expected.sum()), rel=1e-4)


def test_wide_well_conditioned_problems_have_the_order_of_float64():
    H, C, _, _, _ = problem(n=1100, m=20, rows=4000)
    order, gains = eliminate(H, C, 200, dtype=torch.float32)
    reference, expected = eliminate(H, C, 200, dtype=torch.float64)
    assert order.tolist() == reference.tolist()
    torch.testing.assert_close(gains, expected, rtol=1e-4, atol=0)
