"""Baseline scores against their definitions on raw activations."""

import pytest
import torch

from hf_subprune.solver.importance import IMPORTANCES, scores
from hf_subprune.solver.moments import MomentAccumulator
from hf_subprune.solver.problem import Problem


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    B = torch.randn(50, 6, generator=generator, dtype=torch.float64) * torch.arange(1, 7) + 2.0
    return B, torch.randn(6, 4, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("groups", [None, torch.tensor([[0, 3], [1, 4], [2, 5]])])
def test_scores_follow_their_definitions(data, intercept, groups):
    B, W = data
    accumulator = MomentAccumulator(6, intercept=intercept)
    accumulator.update(B)
    problem = Problem([accumulator.moments(W)], W, groups, gradient=torch.arange(6.0))
    own = torch.arange(6)[:, None] if groups is None else groups
    weight = W.square().sum(1)
    expected = {
        "weight_norm": weight[own].sum(1).sqrt(),
        "wanda": (weight * B.square().sum(0))[own].sum(1).sqrt(),
        "fluctuation": (weight * B.var(0, unbiased=False))[own].sum(1),
        "activation_gradient": torch.arange(6.0, dtype=torch.float64)[own].sum(1),
    }
    for name, value in expected.items():
        found = scores(problem, name)
        torch.testing.assert_close(found, value)


def test_random_scores_repeat_with_their_seed(data):
    B, W = data
    accumulator = MomentAccumulator(6, intercept=True)
    accumulator.update(B)
    problem = Problem([accumulator.moments(W)], W)
    draws = [scores(problem, "random", torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_misuse_is_refused(data):
    B, W = data
    accumulator = MomentAccumulator(6, intercept=True)
    accumulator.update(B)
    problem = Problem([accumulator.moments(W)], W)
    with pytest.raises(ValueError, match="gradient"):
        scores(problem, "activation_gradient")
    with pytest.raises(ValueError, match="magnitude"):
        scores(problem, "magnitude")
    assert "greedy" in IMPORTANCES
