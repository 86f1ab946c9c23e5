"""Selection against direct transcriptions of its definition: one least squares problem per candidate."""

import math

import pytest
import torch
from least_squares import brute_greedy, explained, problem

from hf_subprune.solver.objective import Objective
from hf_subprune.solver.problem import columns_of
from hf_subprune.solver.selection import backward, greedy, nested, select
from hf_subprune.solver.settings import Settings, Tuning


@pytest.mark.parametrize("c", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_greedy_takes_the_units_of_the_definition_in_order(c, dtype):
    H, C, t, B, Y = problem(dtype=dtype)
    groups = torch.randperm(24, generator=torch.Generator().manual_seed(1)).view(-1, c)
    path = greedy(Objective(H, C, groups), len(groups) // 2)
    assert path.order.tolist() == brute_greedy(B, Y, groups, len(groups) // 2)
    for k in range(len(groups) // 2 + 1):
        truth = t - explained(B, Y, groups[path.order[:k]].reshape(-1))
        assert t - float(path.objective[k]) == pytest.approx(truth, rel=1e-4, abs=1e-7 * t)


@pytest.mark.parametrize("c", [1, 3])
def test_backward_removes_the_units_of_the_definition_in_order(c):
    H, C, _, B, Y = problem()
    groups = torch.arange(24).view(-1, c)
    k = len(groups) // 2
    path = backward(Objective(H, C, groups), k)
    assert path.order[k:].flip(0).tolist() == brute_greedy(B, Y, groups, len(groups) - k, removal=True)
    assert float(path.objective[0]) == pytest.approx(Objective(H, C, groups).value(path.kept(k)), rel=1e-8)
    with pytest.raises(ValueError, match="holds the sizes"):
        path.kept(k - 1)


@pytest.mark.parametrize("spread", [0, 3])
def test_backward_in_float32_loses_nothing_that_counts(spread):
    generator = torch.Generator().manual_seed(0)
    factors, mixing = torch.randn(1500, 40, generator=generator), torch.randn(40, 300, generator=generator)
    B = (factors @ mixing + torch.randn(1500, 300, generator=generator)).relu()
    B *= 10 ** (spread * (2 * torch.rand(300, generator=generator) - 1))  # columns whose sizes differ by a million
    objective = Objective(B.T @ B, B.T @ B @ torch.randn(300, 50, generator=generator))
    exact, single = (backward(objective, 220, tuning=Tuning(double_below=below)) for below in (4096, 0))
    best, found, whole = (objective.value(units) for units in (exact.kept(220), single.kept(220), torch.arange(300)))
    assert whole - found <= 1.001 * (whole - best)
    assert float(single.objective[0]) == pytest.approx(found, rel=1e-4)


def test_a_pool_that_misses_the_best_column_cuts_the_panel():
    # Three pairs whose sum only is useful: taking one of a pair makes the other, worthless alone, the best of all.
    generator = torch.Generator().manual_seed(0)
    noise = 30 * torch.randn(500, 40, generator=generator, dtype=torch.float64)
    signal = torch.randn(500, 40, generator=generator, dtype=torch.float64)
    B = torch.stack([noise + signal, noise], 2).reshape(500, 80)
    Y = signal * torch.linspace(1, 3, 40, dtype=torch.float64)
    path = greedy(Objective(B.T @ B, B.T @ Y), 40)
    assert path.order.tolist() == brute_greedy(B, Y, torch.arange(80)[:, None], 40)


def test_every_prefix_is_the_run_of_that_size():
    H, C, _, _, _ = problem()
    path = greedy(Objective(H, C), 24)
    for k in (0, 1, 7, 24):
        assert path.kept(k).tolist() == sorted(greedy(Objective(H, C), k).order.tolist())


@pytest.mark.parametrize("double_below", [1024, 0])  # at 0, small problems begin in float32 as wide ones do
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "damage", ["duplicates", "dead", "rank", "condition", "scales", "few_rows", "all_dead", "constant"]
)
def test_ill_conditioned_problems_reach_the_objective_of_the_definition(damage, dtype, double_below):
    _, _, _, B, _ = problem(n=30, rows=300, seed=3)
    generator = torch.Generator().manual_seed(4)
    W = torch.randn(30, 6, generator=generator, dtype=torch.float64)
    if damage == "duplicates":
        B[:, 10:20] = B[:, :10]
    elif damage == "dead":
        B[:, ::3] = 0
    elif damage == "rank":
        B = B[:, :7] @ torch.randn(7, 30, generator=generator, dtype=torch.float64)
    elif damage == "condition":
        U, _, Vh = torch.linalg.svd(B, full_matrices=False)
        B = U * torch.logspace(0, -6, 30, dtype=torch.float64) @ Vh
    elif damage == "scales":
        scale = torch.logspace(-6, 6, 30, dtype=torch.float64)
        B, W = B * scale, W / scale[:, None]
    elif damage == "few_rows":
        B = B[:12]
    elif damage == "all_dead":
        B = torch.zeros_like(B)
    elif damage == "constant":
        B = torch.ones_like(B)
    Y = B @ W
    H, C, t = (B.T @ B).to(dtype), (B.T @ Y).to(dtype), float(Y.square().sum())
    objective, tuning = Objective(H, C), Tuning(double_below=double_below)
    path = greedy(objective, 30, tuning=tuning)
    assert sorted(path.order.tolist()) == list(range(30))
    assert bool((path.objective.diff() >= 0).all())
    reference = brute_greedy(B, Y, torch.arange(30)[:, None], 10)
    truth = explained(B, Y, torch.tensor(reference))
    assert explained(B, Y, path.kept(10)) >= truth - 1e-4 * t
    for method in ("backward", "stochastic", "greedy"):
        chosen = select(objective, 25, Settings(method=method, tuning=tuning))
        assert explained(B, Y, chosen.kept) >= explained(B, Y, path.kept(25)) - 1e-2 * t
    for groups in (torch.arange(30).view(10, 3), torch.arange(30).view(15, 2)):
        chosen = select(Objective(H, C, groups), 4, Settings(method="greedy", tuning=tuning))
        reached = explained(B, Y, columns_of(chosen.kept, groups))
        assert reached >= explained(B, Y, groups[brute_greedy(B, Y, groups, 4)].reshape(-1)) - 1e-4 * t


def test_duplicates_and_dead_columns_come_last():
    _, _, t, B, Y = problem(n=20)
    B = torch.cat([B, B[:, :5], torch.zeros(len(B), 5, dtype=B.dtype)], 1)
    path = greedy(Objective(B.T @ B, B.T @ Y), 30)
    first = {u - 20 if 20 <= u < 25 else u for u in path.order[:20].tolist()}
    assert first == set(range(20))
    assert t - float(path.objective[20]) < 1e-9 * t
    assert float(path.objective[-1] - path.objective[20]) < 1e-9 * t


def test_stochastic_greedy_repeats_with_its_seed_and_comes_near_greedy():
    H, C, _, _, _ = problem(n=60, rows=300)
    runs = [greedy(Objective(H, C), 20, epsilon=0.01, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert runs[0].order.tolist() == runs[1].order.tolist()
    assert len(set(runs[2].order.tolist())) == 20
    best = float(greedy(Objective(H, C), 20).objective[-1])
    assert all(float(run.objective[-1]) > 0.95 * best for run in runs)
    everything = greedy(Objective(H, C), 20, epsilon=math.exp(-20), generator=torch.Generator())
    assert everything.order.tolist() == greedy(Objective(H, C), 20).order.tolist()


def test_groups_of_one_column_are_single_columns():
    H, C, _, _, _ = problem()
    order = torch.randperm(24, generator=torch.Generator().manual_seed(2))
    path = greedy(Objective(H, C, order[:, None]), 12)
    assert order[path.order].tolist() == greedy(Objective(H, C), 12).order.tolist()


def test_misuse_is_refused_with_what_was_found():
    H, C, _, _, _ = problem()
    with pytest.raises(ValueError, match="0 to 24 units, not 25"):
        greedy(Objective(H, C), 25)
    with pytest.raises(ValueError, match="greedyish"):
        select(Objective(H, C), 3, Settings(method="greedyish"))
    with pytest.raises(ValueError, match="epsilon"):
        greedy(Objective(H, C), 1, epsilon=2.0)
    with pytest.raises(ValueError, match="multiples of the 3 sets"):
        select(Objective(H, C, torch.arange(24).view(12, 2), sets=3), 4, Settings())


def test_all_units_can_be_kept():
    H, C, *_ = problem()
    assert select(Objective(H, C), 24, Settings()).kept.tolist() == list(range(24))


@pytest.mark.parametrize("c", [1, 2])
@pytest.mark.parametrize("removal", [False, True])
def test_equally_many_units_of_each_set_are_taken_as_by_the_definition(c, removal):
    H, C, _, B, Y = problem(n=12 * c)
    groups = torch.randperm(12 * c, generator=torch.Generator().manual_seed(1)).view(12, c)
    chosen, order = {0: 0, 1: 0, 2: 0}, []  # of the sets 0..3, 4..7 and 8..11, two each
    for _ in range(6):

        def value(u):
            units = sorted(set(range(12)) - {*order, u}) if removal else [*order, u]
            return explained(B, Y, groups[units].reshape(-1))

        best = max((u for u in range(12) if u not in order and chosen[u // 4] < 2), key=value)
        chosen[best // 4] += 1
        order.append(best)
    path = (backward if removal else greedy)(Objective(H, C, groups, sets=3), 6)
    assert (path.order[6:].flip(0) if removal else path.order).tolist() == order


def test_the_path_of_a_given_order_has_the_objective_of_its_sets():
    H, C, *_ = problem(n=12)
    objective = Objective(H, C, torch.arange(12).view(4, 3))
    path = nested(objective, torch.tensor([2, 0, 3, 1]))
    for k in range(1, 5):
        assert float(path.objective[k]) == pytest.approx(objective.value(path.kept(k)), rel=1e-6)
    assert float(path.objective[0]) == 0 and path.kept(2).tolist() == [0, 2]
