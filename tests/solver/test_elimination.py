"""Panels of pivots against one pivot at a time."""

import pytest
import torch
from least_squares import problem

from hf_subprune.solver.elimination import eliminate
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


def test_wide_well_conditioned_problems_have_the_order_of_float64():
    H, C, _, _, _ = problem(n=1100, m=20, rows=4000)
    order, gains = eliminate(H, C, 200, dtype=torch.float32)
    reference, expected = eliminate(H, C, 200, dtype=torch.float64)
    assert order.tolist() == reference.tolist()
    torch.testing.assert_close(gains, expected, rtol=1e-4, atol=0)
