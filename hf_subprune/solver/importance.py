"""Baseline importances, for comparison: they score units one by one, without solving for what is lost together.

Scores read moments and weights only. Tensors only.
"""

import torch

from .problem import Problem

IMPORTANCES = ("greedy", "random", "weight_norm", "activation_gradient", "wanda", "fluctuation")


def scores(problem: Problem, name: str, generator: torch.Generator | None = None) -> torch.Tensor:
    """Score units; those with the largest scores are kept.

    - `"random"`: uniform noise.
    - `"weight_norm"`: `||W_j||` (the paper's LayerWeightNorm).
    - `"activation_gradient"`: mean `|activation x gradient|` of each column, given as `gradient` (LayerActGrad).
    - `"wanda"`: `||W_j|| ||B_j||`, weight norm times activation norm (Wanda, summed over outputs).
    - `"fluctuation"`: `var(B_j) ||W_j||^2` (FLAP, arXiv 2312.11983). Its bias correction is what reweighting with
      infinite shrinkage does.

    Args:
        problem: Of the block. A unit scores the sum of its columns (norms are added as squares).
        name: One of the above.
        generator: For `"random"` only.

    Returns:
        `(units,)` float64.

    Raises:
        ValueError: the name is unknown, or the gradient is missing.
    """
    W = problem.W.double()
    groups = problem.columns.to(W.device)
    weight = W.square().sum(1)
    if name == "random":
        return torch.rand(len(groups), dtype=torch.float64, generator=generator).to(W.device)
    if name == "weight_norm":
        return weight[groups].sum(1).sqrt()
    if name in ("wanda", "fluctuation"):
        moments = problem.total()
        # Centred and raw squared norms differ by the mean; Wanda wants the raw one, FLAP the centred one.
        energy, mean = moments.H.diagonal().double(), moments.rows * moments.input_mean.double().square()
        if name == "wanda":
            return (weight * (energy + mean if moments.intercept else energy))[groups].sum(1).sqrt()
        return (weight * (energy if moments.intercept else energy - mean).clamp_min(0.0))[groups].sum(1) / moments.rows
    if name == "activation_gradient":
        if problem.gradient is None:
            raise ValueError("Importance 'activation_gradient' needs `gradient`, the mean |activation x gradient|.")
        return problem.gradient.double().to(W.device)[groups].sum(1)
    raise ValueError(f"Unknown importance {name!r}: choose from {', '.join(IMPORTANCES[1:])}.")


def highest(scores: torch.Tensor, k: int, sets: int = 1) -> torch.Tensor:
    """The `k` units of the highest scores, `(k,)` int64, sorted: equally many of each set of units."""
    best = scores.view(sets, -1).topk(k // sets).indices
    first = torch.arange(0, len(scores), len(scores) // sets, device=best.device)
    return (best + first[:, None]).flatten().sort().values
