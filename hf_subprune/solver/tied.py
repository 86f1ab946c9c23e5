"""Choose the units of blocks that must all keep the same ones. Tensors only."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from .factorisation import factorise
from .importance import scores
from .moments import Moments, combine
from .selection import greedy, select
from .solve import metric_root, regularise, selection_shrinkage

# Blocks of up to this many columns in all are one selection problem, which takes memory with the square of them.
_JOINTLY = 4096


@dataclass(frozen=True, eq=False)
class Problem:
    """What `solver.solve_block` knows of one block.

    Args:
        folds: Moments of disjoint parts of the calibration rows.
        W: `(n, m)`, the consumer's weight, inputs by outputs.
        groups: `(units, c)` int64, columns of each unit.
        output_metric: `(m, m)`, `M` of `sensitivity.output_metrics`; `None` weighs all outputs equally.
        sets: Units come in this many sets of equal size, one after the other, of each of which equally many are kept.
        gradient: `(n,)`, of `sensitivity.activation_gradients`, for importance `"activation_gradient"`.
    """

    folds: Sequence[Moments]
    W: torch.Tensor
    groups: torch.Tensor
    output_metric: torch.Tensor | None = None
    sets: int = 1
    gradient: torch.Tensor | None = None


def choose_together(
    problems: Sequence[Problem],
    k: int,
    *,
    shrinkage: float | str = "auto",
    importance: str = "greedy",
    method: str = "auto",
    swaps: int | None = None,
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, str]:
    """The `k` units that serve all blocks best when each keeps the same ones.

    The objective is the sum over the blocks of `F_i(S) / t_i`, the fraction of its output's energy that block `i`
    captures with the units `S`; with output metrics it is the sum of the `F_i(S)` themselves, which metrics make
    comparable. It is the objective of selection on the block diagonal of all `H_i`, where a unit owns its columns in
    every block. Where that is too large, units are ranked by what removing each of them alone costs in all.

    Args:
        problems: The blocks; of as many units each.
        k: Number of units to keep.
        shrinkage: As for `solver.solve_block`, and so are the others.

    Returns:
        `(k,)` int64, sorted, and the method that chose them.

    Raises:
        ValueError: the blocks differ in their number of units, or as `selection.select`.
    """
    if len({len(problem.groups) for problem in problems}) != 1:
        raise ValueError(f"Tied blocks have one number of units, got {[len(p.groups) for p in problems]}.")
    if importance != "greedy":
        ranks = [
            scores(importance, combine(p.folds), p.W, groups=p.groups, gradient=p.gradient, generator=generator).cpu()
            for p in problems
        ]
        total = torch.stack([rank / rank.sum().clamp_min(torch.finfo(rank.dtype).tiny) for rank in ranks]).sum(0)
        return total.topk(k).indices.sort().values, f"{importance}, tied"
    if _too_large(problems):
        costs = _removal_costs(problems, selection_shrinkage(shrinkage))
        return costs.topk(k).indices.sort().values, "removal costs, tied"
    H, C, groups = _joint(problems, selection_shrinkage(shrinkage))
    chosen = select(H, C, k, groups=groups, method=method, swaps=swaps, generator=generator)
    return chosen.kept.cpu(), f"{chosen.method}, tied"


def order_together(problems: Sequence[Problem], shrinkage: float | str = "auto") -> torch.Tensor:
    """`(units,)` int64, all units in the order in which greedy, or else the rank, takes them for all blocks."""
    if _too_large(problems):
        return _removal_costs(problems, selection_shrinkage(shrinkage)).argsort(descending=True, stable=True)
    H, C, groups = _joint(problems, selection_shrinkage(shrinkage))
    return greedy(H, C, len(groups), groups=groups).order.cpu()


def _too_large(problems: Sequence[Problem]) -> bool:
    return sum(len(problem.W) for problem in problems) > _JOINTLY


def _joint(problems: Sequence[Problem], shrinkage: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One selection problem `H`, `C`, `groups` of all blocks."""
    parts = [_weighed(problem, problems, shrinkage) for problem in problems]
    outputs = max(C.shape[1] for _, C in parts)
    groups, start = [], 0
    for problem in problems:
        groups.append(problem.groups.cpu() + start)
        start += len(problem.W)
    H = torch.block_diag(*(H for H, _ in parts))
    return H, torch.cat([pad(C, (0, outputs - C.shape[1])) for _, C in parts]), torch.cat(groups, 1)


def _weighed(problem: Problem, problems: Sequence[Problem], shrinkage: float) -> tuple[torch.Tensor, torch.Tensor]:
    """`H` and `C` of one block's part in the objective, on the device of the first block."""
    metrics = all(p.output_metric is not None for p in problems)
    root = metric_root(problem.output_metric) if metrics and problem.output_metric is not None else None
    H, C, t = regularise(combine(problem.folds), problem.W, shrinkage, root)
    device = problems[0].W.device
    if root is None:
        C *= 1 / math.sqrt(t) if t > 0 else 0.0
    return H.to(device), C.to(device)


def _removal_costs(problems: Sequence[Problem], shrinkage: float) -> torch.Tensor:
    """`(units,)` float64: what removing each unit alone takes from the objective.

    In one block it is `tr(V_g' P_gg^-1 V_g)` with `P = H^-1` and `V = P C`.
    """
    costs = torch.zeros(len(problems[0].groups), dtype=torch.float64)
    for problem in problems:
        H, C = _weighed(problem, problems, shrinkage)
        groups = problem.groups.to(H.device)
        factor, scale, _ = factorise(H)
        P = torch.cholesky_inverse(factor)
        V = torch.cholesky_solve(C.double() * scale[:, None], factor)[groups]
        costs += (V * torch.linalg.solve(P[groups[:, :, None], groups[:, None]], V)).sum((1, 2)).cpu()
    return costs
