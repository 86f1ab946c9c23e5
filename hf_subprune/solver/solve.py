"""Solve one block from its moments: which units to keep, the new weights, and how good both are.

The paper's reweighted input change (El Halabi et al., NeurIPS 2022, arXiv 2203.04940) of one block: units S, at most k
of them, and weights V on them in `min ||A W - B_S V||_F^2`, with `W` `(n, m)` the consumer's weight, and `A` and `B`
`(rows, n)` its inputs in the original model and in the one pruned so far. They are read as second moments only. The
stages in their order: selection (`selection`), shrinkage and weights (`reweighting`), certificate. Tensors only.
"""

import math
from dataclasses import dataclass, replace

import torch

from .certificates import certify
from .importance import highest, scores
from .objective import objective_of
from .problem import Problem, columns_of
from .reweighting import Reweighted, cross_fit, relative_error, reweight
from .selection import select
from .settings import Settings


@dataclass(frozen=True, eq=False)
class BlockSolution:
    """What to do to one block.

    Args:
        kept_units: `(k,)` int64, sorted.
        kept_columns: `(k * c,)` int64, sorted; the rows of `V`.
        V: `(k * c, m)`, the consumer's new weight, inputs by outputs.
        bias_shift: `(m,)`, to be added to the consumer's bias; zeros without one.
        shrinkage: lambda of the reweighting; infinity when the weights stay as they are, or none is left.
        fitted_error: Relative error on all rows fitted on.
        method: How units were chosen: `"greedy"`, `"backward"`, `"stochastic"`, or the name of an importance.
        guarantee: Part of what any choice of as many units could capture that the kept ones capture at least
            (`certificates`); `None` for importances that do not maximise the objective.
    """

    kept_units: torch.Tensor
    kept_columns: torch.Tensor
    V: torch.Tensor
    bias_shift: torch.Tensor
    shrinkage: float
    fitted_error: float
    method: str
    guarantee: float | None


@dataclass(frozen=True, eq=False)
class Choice:
    """Units to keep in a block; the other fields are those of `BlockSolution`."""

    kept: torch.Tensor
    method: str
    guarantee: float | None = None


NOTHING = Choice(torch.empty(0, dtype=torch.long), "removed", guarantee=1.0)
"""No unit, of which there is one choice."""


def choose(problem: Problem, k: int, settings: Settings) -> Choice:
    """Choose the `k` units of a block that `solve` keeps.

    Raises:
        ValueError: `k`, a name or a shape does not fit.
        RuntimeError: the moments are not positive semi-definite.
    """
    if k == 0:
        return NOTHING
    if settings.importance != "greedy":
        ranked = scores(problem, settings.importance, settings.generator())
        return Choice(highest(ranked, k, problem.sets), settings.importance)
    best = select(objective_of(problem, settings), k, settings)
    return Choice(best.kept, best.method, best.guarantee)


def solve(problem: Problem, k: int, settings: Settings, chosen: Choice | None = None) -> BlockSolution:
    """Choose `k` units of a block and the weights on them.

    Greedily, S maximises `F(S) = tr(C_S' H_SS^-1 C_S)`; then `V = (H_SS + l I)^-1 (C_S + l W_S)` with
    `l = lambda * mean(diag H)`, where `H = B'B` `(n, n)` and `C = B'A W` `(n, m)`, centred where the consumer has a
    bias, and of `C` what cross-fitting lets count (`reweighting`). Of units that are copies of one another, one kept
    unit gets all weights in `W` (`redundancy`).

    Args:
        problem: Of the block.
        k: Number of units to keep; all of them leaves the block exactly as it is, none leaves the mean of the target
            to the bias, if there is one.
        settings: How.
        chosen: Units to keep, for a block that must keep what others keep (`tied.choose_together`): selection is left
            out, and the guarantee is that of these units in this block.

    Raises:
        ValueError: `k`, a name or a shape does not fit.
        RuntimeError: the moments are not positive semi-definite.
    """
    if not 0 <= k <= problem.units:
        raise ValueError(f"A block of {problem.units} units can keep 0 to {problem.units} of them, not {k}.")
    if k == problem.units:
        return _whole(problem)
    if chosen is None or k == 0:
        chosen = choose(problem, k, settings)
        choice = replace(chosen, kept=chosen.kept.to(problem.W.device))
    else:
        choice = _certified(problem, chosen, settings)
    columns = columns_of(choice.kept, problem.groups)
    total = problem.total()
    shrinkage = math.inf
    if settings.reweight:
        prior = problem.redundancy.folded(problem.W, choice.kept)
        shrinkage, mending = _strengths(problem, prior, columns, settings)
        new = reweight(total, prior, columns, shrinkage, mending)
    else:
        new = Reweighted(problem.W.to(total.H)[columns], torch.zeros_like(total.target_mean), 0.0)
    return BlockSolution(
        kept_units=choice.kept,
        kept_columns=columns,
        V=new.V,
        bias_shift=new.bias_shift,
        shrinkage=shrinkage,
        fitted_error=relative_error(total, columns, new.V, new.bias_shift),
        method=choice.method,
        guarantee=choice.guarantee,
    )


def _strengths(
    problem: Problem, prior: torch.Tensor, columns: torch.Tensor, settings: Settings
) -> tuple[float, float]:
    """lambda of the fit on the kept columns, which pulls to the prior (infinity where none is kept), and mending."""
    if len(columns) == 0:
        return math.inf, 1.0
    if settings.shrinkage == "auto" and len(problem.folds) > 1:
        found = cross_fit(problem.folds, prior, columns)
        return found.shrinkage, found.mending
    return settings.fixed_shrinkage, 1.0


def _whole(problem: Problem) -> BlockSolution:
    """The solution that keeps every unit: the block as it is."""
    every = torch.arange(problem.units, device=problem.W.device)
    columns = columns_of(every, problem.groups)
    zero = torch.zeros_like(problem.folds[0].target_mean)
    return BlockSolution(every, columns, problem.W[columns], zero, math.inf, 0.0, "all", 1.0)


def _certified(problem: Problem, chosen: Choice, settings: Settings) -> Choice:
    """Units chosen elsewhere, on the problem's device, with what they guarantee in this block."""
    choice = replace(chosen, kept=chosen.kept.to(problem.W.device))
    if settings.importance != "greedy":
        return choice
    objective = objective_of(problem, settings)
    return replace(choice, guarantee=certify(objective, choice.kept).fraction)
