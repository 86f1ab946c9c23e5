"""Exchanges of units against the definition of the objective."""

from dataclasses import replace
from itertools import combinations

import pytest
import torch
from least_squares import explained, problem

from hf_subprune.solver.objective import Objective
from hf_subprune.solver.selection import select
from hf_subprune.solver.settings import Settings, Tuning


@pytest.mark.parametrize("c", [1, 3])
@pytest.mark.parametrize("method", ["greedy", "backward", "stochastic"])
def test_swaps_end_where_no_exchange_improves(c, method):
    H, C, t, _, _ = problem(n=30, seed=5)
    groups = torch.arange(30).view(-1, c)
    objective, settings = Objective(H, C, groups), Settings(method=method, tuning=Tuning(epsilon=0.5))
    k = len(groups) // 2
    start = select(objective, k, replace(settings, swaps=0))
    chosen = select(objective, k, settings)
    assert chosen.objective >= start.objective
    assert chosen.objective - start.objective == pytest.approx(chosen.swap_gain, abs=1e-9 * t)
    kept = set(chosen.kept.tolist())
    for i in kept:
        for j in set(range(len(groups))) - kept:
            swapped = torch.tensor(sorted(kept - {i} | {j}))
            assert objective.value(swapped) <= chosen.objective + 1e-8 * t


def test_swaps_repair_a_bad_start_and_respect_their_budget():
    H, C, _, _, _ = problem(n=60, rows=300)
    objective, tuning = Objective(H, C), Tuning(epsilon=0.9)
    poor = select(objective, 20, Settings(method="stochastic", swaps=0, tuning=tuning))
    for budget in (1, 3):
        fixed = select(objective, 20, Settings(method="stochastic", swaps=budget, tuning=tuning))
        assert fixed.swaps <= budget
        assert fixed.objective > poor.objective
        assert len(set(fixed.kept.tolist()) - set(poor.kept.tolist())) <= budget


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_swaps_find_columns_that_add_much_only_together(dtype):
    generator = torch.Generator().manual_seed(0)
    rows, signals, others = 2000, 12, 150

    def normal(count):
        return torch.randn(rows, count, generator=generator, dtype=torch.float64)

    signal, common, other = normal(signals), 10 * normal(signals), normal(others)
    # A pair of columns gives its signal exactly, one of them next to nothing; a noisy copy gives half of it.
    B = torch.cat([signal + normal(signals), signal + normal(signals), other, common + signal, common], dim=1)
    Y = torch.cat([signal, 0.2 * other], dim=1)
    pairs = torch.arange(2 * signals + others, B.shape[1])
    objective = Objective((B.T @ B).to(dtype), (B.T @ Y).to(dtype))
    start = select(objective, 2 * signals, Settings(method="greedy", swaps=0))
    assert not set(start.kept.tolist()) & set(pairs.tolist())
    assert select(objective, 2 * signals, Settings(method="greedy")).kept.tolist() == pairs.tolist()


def test_units_change_places_within_their_set_until_none_improves():
    for seed in range(4):
        H, C, _, B, Y = problem(n=24, seed=seed)
        groups = torch.arange(24).view(8, 3)
        values = {
            (*one, *other): explained(B, Y, groups[[*one, *other]].reshape(-1))
            for one in combinations(range(4), 2)
            for other in combinations(range(4, 8), 2)
        }
        chosen = select(Objective(H, C, groups, sets=2), 4, Settings())
        kept = tuple(chosen.kept.tolist())
        assert chosen.objective == pytest.approx(values[kept], rel=1e-6)
        assert all(values[other] <= chosen.objective * (1 + 1e-6) for other in values if len({*other} - {*kept}) == 1)
        assert max(values.values()) * chosen.guarantee <= chosen.objective * (1 + 1e-6)
    # Without sets, the first and the second half need not keep equally many.
    freely = [select(Objective(*problem(n=24, seed=seed)[:2], groups), 4, Settings()).kept for seed in range(4)]
    assert {int((kept < 4).sum()) for kept in freely} != {2}
