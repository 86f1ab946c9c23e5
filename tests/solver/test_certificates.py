"""Bounds against brute force over all subsets of small problems."""

import itertools
import math

import pytest
import torch

from hf_subprune.solver.certificates import certify, least_eigenvalue
from hf_subprune.solver.objective import Objective
from hf_subprune.solver.selection import greedy, select
from hf_subprune.solver.settings import Settings


def problem(seed, n=8, rows=40, correlation=1.0, ridge=0.0, groups=None):
    generator = torch.Generator().manual_seed(seed)
    B = torch.randn(rows, n, generator=generator, dtype=torch.float64)
    B += correlation * torch.randn(rows, 1, generator=generator, dtype=torch.float64)
    W = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    H = B.T @ B
    shrinkage = ridge * H.diagonal().mean()
    return Objective(H + shrinkage * torch.eye(n, dtype=torch.float64), H @ W + shrinkage * W, groups)


def best(objective, k):
    return max(objective.value(torch.tensor(units)) for units in itertools.combinations(range(objective.units), k))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("c", [1, 2])
@pytest.mark.parametrize("correlation", [0.0, 1.0, 10.0])
@pytest.mark.parametrize("ridge", [0.0, 0.1])
def test_no_subset_beats_a_bound(seed, c, correlation, ridge):
    objective = problem(seed, n=8, correlation=correlation, ridge=ridge, groups=torch.arange(8).view(-1, c))
    for k in range(1, objective.units):
        optimum = best(objective, k)
        kept = greedy(objective, k).kept(k)
        certificate = certify(objective, kept)
        assert certificate.objective == pytest.approx(objective.value(kept))
        assert optimum <= certificate.ceiling * (1 + 1e-9)
        assert certificate.ceiling <= certificate.full * (1 + 1e-9)
        assert certificate.fraction <= certificate.objective / optimum + 1e-9
        assert certificate.objective >= certificate.greedy_fraction * optimum * (1 - 1e-9)
        assert certificate.greedy_fraction == pytest.approx(1 - math.exp(-certificate.gamma))
        # The bound is about any selection, not only a good one.
        worst = torch.arange(k)
        assert optimum <= certify(objective, worst).ceiling * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(6))
def test_the_submodularity_ratio_is_bounded(seed):
    objective = problem(seed, n=6, correlation=2.0)
    gamma = certify(objective, torch.arange(3)).gamma
    for k in range(5):
        for base in itertools.combinations(range(6), k):
            F = objective.value(torch.tensor(base, dtype=torch.int64))
            rest = [u for u in range(6) if u not in base]
            for extra in itertools.chain.from_iterable(itertools.combinations(rest, r) for r in (2, 3)):
                together = objective.value(torch.tensor(sorted([*base, *extra]))) - F
                alone = sum(objective.value(torch.tensor(sorted([*base, u]))) - F for u in extra)
                assert alone >= gamma * together - 1e-9


def test_uncorrelated_columns_are_certified_optimal():
    H, C = torch.diag(torch.arange(1.0, 9.0, dtype=torch.float64)), torch.ones(8, 2, dtype=torch.float64)
    objective = Objective(H, C)
    certificate = certify(objective, select(objective, 3, Settings()).kept)
    # Gains add up without interaction: the ceiling is the sum of the six best, the share of the best three known.
    assert certificate.gamma == pytest.approx(1, abs=0.06)
    assert certificate.greedy_fraction == pytest.approx(1 - 1 / math.e, abs=0.03)
    assert certificate.objective == pytest.approx(2 * (1 + 1 / 2 + 1 / 3))


def test_rank_deficient_problems_are_bounded_too():
    objective = problem(0, n=8, rows=4)
    objective.C[3], objective.H[3], objective.H[:, 3] = 0, 0, 0
    certificate = certify(objective, select(objective, 3, Settings()).kept)
    assert best(objective, 3) <= certificate.ceiling * (1 + 1e-6)
    assert certificate.gamma < 1e-6


@pytest.mark.parametrize("n", [1, 5, 60])
def test_least_eigenvalue_is_a_close_lower_bound(n):
    H = problem(1, n=n, rows=2 * n).H
    truth = float(torch.linalg.eigvalsh(H)[0])
    assert 0.7 * truth < least_eigenvalue(H) <= truth
    assert least_eigenvalue(-H) == 0.0


def test_keeping_everything_keeps_everything():
    assert certify(problem(2), torch.arange(8)).fraction == 1.0
