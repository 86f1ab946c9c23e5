"""Selection against direct transcriptions of its definition: one least squares problem per candidate."""

import math
from itertools import combinations

import pytest
import torch

from hf_subprune.solver import elimination, selection
from hf_subprune.solver.problem import columns_of
from hf_subprune.solver.selection import backward, greedy, objective, select


def problem(n=24, m=6, rows=200, seed=0, dtype=torch.float64):
    """Moments of correlated columns with a low-rank part, a target, and its squared norm."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    B = normal(rows, n // 3) @ normal(n // 3, n) + 0.5 * normal(rows, n)
    Y = B @ normal(n, m)
    return (B.T @ B).to(dtype), (B.T @ Y).to(dtype), float(Y.square().sum()), B, Y


def explained(B, Y, columns):
    """`||Y||^2` less the residual of least squares on raw rows, in float64."""
    if len(columns) == 0:
        return 0.0
    X = B[:, columns]
    return float(Y.square().sum() - (Y - X @ torch.linalg.lstsq(X, Y, driver="gelsd").solution).square().sum())


def brute_greedy(B, Y, groups, k, removal=False):
    """The paper's greedy (or backward elimination) with one least squares problem per candidate and step."""
    left, order = list(range(len(groups))), []
    for _ in range(k):

        def value(u):
            units = [v for v in left if v != u] if removal else [*order, u]
            return explained(B, Y, groups[units].reshape(-1))

        best = max(left, key=value)
        order.append(best)
        left.remove(best)
    return order


@pytest.mark.parametrize("c", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_greedy_takes_the_units_of_the_definition_in_order(c, dtype):
    H, C, t, B, Y = problem(dtype=dtype)
    groups = torch.randperm(24, generator=torch.Generator().manual_seed(1)).view(-1, c)
    path = greedy(H, C, len(groups) // 2, groups=groups, t=t)
    assert path.order.tolist() == brute_greedy(B, Y, groups, len(groups) // 2)
    for k in range(len(groups) // 2 + 1):
        truth = t - explained(B, Y, groups[path.order[:k]].reshape(-1))
        assert float(path.errors[k]) == pytest.approx(truth, rel=1e-4, abs=1e-7 * t)


@pytest.mark.parametrize("c", [1, 3])
def test_backward_removes_the_units_of_the_definition_in_order(c):
    H, C, t, B, Y = problem()
    groups = torch.arange(24).view(-1, c)
    k = len(groups) // 2
    path = backward(H, C, k, groups=groups, t=t)
    assert path.order[k:].flip(0).tolist() == brute_greedy(B, Y, groups, len(groups) - k, removal=True)
    assert float(path.objective[0]) == pytest.approx(objective(H, C, columns_of(path.kept(k), groups)), rel=1e-8)
    with pytest.raises(ValueError, match="holds the sizes"):
        path.kept(k - 1)


@pytest.mark.parametrize("smallest", [False, True])
@pytest.mark.parametrize(("panel", "pool"), [(16, 1), (16, 2), (8, 4)])
def test_speculated_panels_agree_with_one_pivot_at_a_time(monkeypatch, smallest, panel, pool):
    H, C, _, _, _ = problem(n=150, m=10, rows=400)
    if smallest:
        C = torch.linalg.solve(H, C)
        H = torch.linalg.inv(H)
    monkeypatch.setattr(elimination, "_PANEL", 1)
    reference, gains = elimination.eliminate(H, C, 120, dtype=torch.float64, smallest=smallest)
    monkeypatch.setattr(elimination, "_PANEL", panel)
    monkeypatch.setattr(elimination, "_POOL", pool)
    monkeypatch.setattr(elimination, "_FIRST_POOL", panel)
    order, fast = elimination.eliminate(H, C, 120, dtype=torch.float64, smallest=smallest)
    assert order.tolist() == reference.tolist()
    torch.testing.assert_close(fast, gains)


def test_a_pool_that_misses_the_best_column_cuts_the_panel():
    # Three pairs whose sum only is useful: taking one of a pair makes the other, worthless alone, the best of all.
    generator = torch.Generator().manual_seed(0)
    noise = 30 * torch.randn(500, 40, generator=generator, dtype=torch.float64)
    signal = torch.randn(500, 40, generator=generator, dtype=torch.float64)
    B = torch.stack([noise + signal, noise], 2).reshape(500, 80)
    Y = signal * torch.linspace(1, 3, 40, dtype=torch.float64)
    path = greedy(B.T @ B, B.T @ Y, 40)
    assert path.order.tolist() == brute_greedy(B, Y, torch.arange(80)[:, None], 40)


def test_wide_well_conditioned_problems_have_the_order_of_float64():
    H, C, _, _, _ = problem(n=1100, m=20, rows=4000)
    order, gains = elimination.eliminate(H, C, 200, dtype=torch.float32)
    reference, expected = elimination.eliminate(H, C, 200, dtype=torch.float64)
    assert order.tolist() == reference.tolist()
    torch.testing.assert_close(gains, expected, rtol=1e-4, atol=0)


def test_every_prefix_is_the_run_of_that_size():
    H, C, _, _, _ = problem()
    path = greedy(H, C, 24)
    for k in (0, 1, 7, 24):
        assert path.kept(k).tolist() == sorted(greedy(H, C, k).order.tolist())


def test_weights_of_a_path_are_least_squares():
    H, C, _, B, Y = problem()
    path = greedy(H, C, 10)
    V = path.weights(H, C, 7)
    torch.testing.assert_close(V, torch.linalg.lstsq(B[:, path.kept(7)], Y).solution)


@pytest.mark.parametrize("double_below", [1024, 0])  # at 0, small problems begin in float32 as wide ones do
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "damage", ["duplicates", "dead", "rank", "condition", "scales", "few_rows", "all_dead", "constant"]
)
def test_ill_conditioned_problems_reach_the_objective_of_the_definition(monkeypatch, damage, dtype, double_below):
    monkeypatch.setattr(selection, "_DOUBLE_BELOW", double_below)
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
    path = greedy(H, C, 30, t=t)
    assert sorted(path.order.tolist()) == list(range(30))
    assert bool((path.gains >= 0).all())
    reference = brute_greedy(B, Y, torch.arange(30)[:, None], 10)
    truth = explained(B, Y, torch.tensor(reference))
    assert explained(B, Y, path.kept(10)) >= truth - 1e-4 * t
    for method in ("backward", "stochastic", "greedy"):
        assert explained(B, Y, select(H, C, 25, method=method).kept) >= explained(B, Y, path.kept(25)) - 1e-2 * t
    for groups in (torch.arange(30).view(10, 3), torch.arange(30).view(15, 2)):
        chosen = select(H, C, 4, groups=groups, method="greedy")
        reached = explained(B, Y, columns_of(chosen.kept, groups))
        assert reached >= explained(B, Y, groups[brute_greedy(B, Y, groups, 4)].reshape(-1)) - 1e-4 * t


def test_duplicates_and_dead_columns_come_last():
    _, _, t, B, Y = problem(n=20)
    B = torch.cat([B, B[:, :5], torch.zeros(len(B), 5, dtype=B.dtype)], 1)
    path = greedy(B.T @ B, B.T @ Y, 30, t=t)
    first = {u - 20 if 20 <= u < 25 else u for u in path.order[:20].tolist()}
    assert first == set(range(20))
    assert float(path.errors[20]) < 1e-9 * t
    assert float(path.gains[20:].sum()) < 1e-9 * t


@pytest.mark.parametrize("c", [1, 3])
@pytest.mark.parametrize("method", ["greedy", "backward", "stochastic"])
def test_swaps_end_where_no_exchange_improves(c, method):
    H, C, t, _, _ = problem(n=30, seed=5)
    groups = torch.arange(30).view(-1, c)
    generator = torch.Generator().manual_seed(0)
    k = len(groups) // 2
    start = select(H, C, k, groups=groups, method=method, swaps=0, epsilon=0.5, generator=generator)
    chosen = select(H, C, k, groups=groups, method=method, epsilon=0.5, generator=generator.manual_seed(0))
    assert chosen.objective >= start.objective
    assert chosen.objective - start.objective == pytest.approx(chosen.swap_gain, abs=1e-9 * t)
    kept = set(chosen.kept.tolist())
    for i in kept:
        for j in set(range(len(groups))) - kept:
            swapped = torch.tensor(sorted(kept - {i} | {j}))
            assert objective(H, C, columns_of(swapped, groups)) <= chosen.objective + 1e-8 * t


def test_swaps_repair_a_bad_start_and_respect_their_budget():
    H, C, _, _, _ = problem(n=60, rows=300)
    poor = select(H, C, 20, method="stochastic", epsilon=0.9, swaps=0, generator=torch.Generator().manual_seed(0))
    for budget in (1, 3):
        fixed = select(
            H, C, 20, method="stochastic", epsilon=0.9, swaps=budget, generator=torch.Generator().manual_seed(0)
        )
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
    H, C = (B.T @ B).to(dtype), (B.T @ Y).to(dtype)
    start = select(H, C, 2 * signals, method="greedy", swaps=0)
    assert not set(start.kept.tolist()) & set(pairs.tolist())
    assert select(H, C, 2 * signals, method="greedy").kept.tolist() == pairs.tolist()


def test_stochastic_greedy_repeats_with_its_seed_and_comes_near_greedy():
    H, C, _, _, _ = problem(n=60, rows=300)
    runs = [greedy(H, C, 20, epsilon=0.01, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert runs[0].order.tolist() == runs[1].order.tolist()
    assert len(set(runs[2].order.tolist())) == 20
    best = float(greedy(H, C, 20).objective[-1])
    assert all(float(run.objective[-1]) > 0.95 * best for run in runs)
    everything = greedy(H, C, 20, epsilon=math.exp(-20), generator=torch.Generator())
    assert everything.order.tolist() == greedy(H, C, 20).order.tolist()


def test_groups_of_one_column_are_single_columns():
    H, C, _, _, _ = problem()
    order = torch.randperm(24, generator=torch.Generator().manual_seed(2))
    path = greedy(H, C, 12, groups=order[:, None])
    assert order[path.order].tolist() == greedy(H, C, 12).order.tolist()


def test_misuse_is_refused_with_what_was_found():
    H, C, _, _, _ = problem()
    with pytest.raises(ValueError, match="0 to 24 units, not 25"):
        greedy(H, C, 25)
    with pytest.raises(ValueError, match="greedyish"):
        select(H, C, 3, method="greedyish")
    with pytest.raises(ValueError, match="share columns"):
        greedy(H, C, 1, groups=torch.tensor([[0, 1], [1, 2]]))
    with pytest.raises(ValueError, match=r"H \(n, n\)"):
        greedy(H[:5], C, 1)
    with pytest.raises(ValueError, match="epsilon"):
        greedy(H, C, 1, epsilon=2.0)
    assert select(H, C, 24).kept.tolist() == list(range(24))
    H[0, 0] = float("nan")
    with pytest.raises(ValueError, match="missing values"):
        select(H, C, 3)


@pytest.mark.parametrize("c", [1, 2])
@pytest.mark.parametrize("removal", [False, True])
def test_equally_many_units_of_each_set_are_taken_as_by_the_definition(c, removal):
    H, C, t, B, Y = problem(n=12 * c)
    groups = torch.randperm(12 * c, generator=torch.Generator().manual_seed(1)).view(12, c)
    chosen, order = {0: 0, 1: 0, 2: 0}, []  # of the sets 0..3, 4..7 and 8..11, two each
    for _ in range(6):

        def value(u):
            units = sorted(set(range(12)) - {*order, u}) if removal else [*order, u]
            return explained(B, Y, groups[units].reshape(-1))

        best = max((u for u in range(12) if u not in order and chosen[u // 4] < 2), key=value)
        chosen[best // 4] += 1
        order.append(best)
    path = (backward if removal else greedy)(H, C, 6, groups=groups, sets=3, t=t)
    assert (path.order[6:].flip(0) if removal else path.order).tolist() == order


def test_units_change_places_within_their_set_until_none_improves():
    for seed in range(4):
        H, C, t, B, Y = problem(n=24, seed=seed)
        groups = torch.arange(24).view(8, 3)
        values = {
            (*one, *other): explained(B, Y, groups[[*one, *other]].reshape(-1))
            for one in combinations(range(4), 2)
            for other in combinations(range(4, 8), 2)
        }
        chosen = select(H, C, 4, groups=groups, sets=2, t=t)
        kept = tuple(chosen.kept.tolist())
        assert chosen.objective == pytest.approx(values[kept], rel=1e-6)
        assert all(values[other] <= chosen.objective * (1 + 1e-6) for other in values if len({*other} - {*kept}) == 1)
        assert max(values.values()) * chosen.guarantee <= chosen.objective * (1 + 1e-6)
    # Without sets, the first and the second half need not keep equally many.
    assert {int((select(*problem(n=24, seed=s)[:2], 4, groups=groups).kept < 4).sum()) for s in range(4)} != {2}


def test_sets_that_cannot_keep_equally_many_are_refused():
    H, C, *_ = problem(n=12)
    with pytest.raises(ValueError, match="multiples of the 3 sets"):
        select(H, C, 4, groups=torch.arange(12).view(6, 2), sets=3)
