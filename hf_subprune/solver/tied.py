"""Choose the units of blocks that must all keep the same ones. Tensors only."""

import math
from collections.abc import Sequence

import torch
from torch.nn.functional import pad

from .factorisation import factorise
from .importance import scores
from .objective import Objective, regularise
from .problem import Problem
from .selection import greedy, select
from .settings import Settings
from .solve import NOTHING, Choice


def choose_together(problems: Sequence[Problem], k: int, settings: Settings) -> Choice:
    """The `k` units that serve all blocks best when each keeps the same ones.

    The objective is the sum over the blocks of `F_i(S) / t_i`, the fraction of its output's energy that block `i`
    captures with the units `S`; with output metrics it is the sum of the `F_i(S)` themselves, which metrics make
    comparable. It is the objective of selection on the block diagonal of all `H_i`, where a unit owns its columns in
    every block. Where that is too large, units are ranked by what removing each of them alone costs in all.

    Args:
        problems: The blocks; of as many units each.
        k: Number of units to keep.
        settings: How; without groups a unit is a column.

    Returns:
        The units, on the CPU, and the method that chose them; what they guarantee in a block is found by `solve`.

    Raises:
        ValueError: the blocks differ in their number of units, or as `selection.select`.
    """
    if len({problem.units for problem in problems}) != 1:
        raise ValueError(f"Tied blocks have one number of units, got {[problem.units for problem in problems]}.")
    if k == 0:
        return NOTHING
    if settings.importance != "greedy":
        generator = settings.generator()  # one for all: each block draws anew
        ranks = [scores(problem, settings.importance, generator).cpu() for problem in problems]
        total = torch.stack([rank / rank.sum().clamp_min(torch.finfo(rank.dtype).tiny) for rank in ranks]).sum(0)
        return Choice(total.topk(k).indices.sort().values, f"{settings.importance}, tied")
    if _too_large(problems, settings):
        costs = _removal_costs(problems, settings)
        return Choice(costs.topk(k).indices.sort().values, "removal costs, tied")
    chosen = select(_joint(problems, settings), k, settings)
    return Choice(chosen.kept.cpu(), f"{chosen.method}, tied")


def order_together(problems: Sequence[Problem], settings: Settings) -> torch.Tensor:
    """`(units,)` int64, all units in the order in which greedy, or else the rank, takes them for all blocks."""
    if _too_large(problems, settings):
        return _removal_costs(problems, settings).argsort(descending=True, stable=True)
    return greedy(_joint(problems, settings), problems[0].units, tuning=settings.tuning).order.cpu()


def _too_large(problems: Sequence[Problem], settings: Settings) -> bool:
    return sum(len(problem.W) for problem in problems) > settings.tuning.jointly


def _joint(problems: Sequence[Problem], settings: Settings) -> Objective:
    """The objective of all blocks together."""
    parts = [_weighed(problem, problems, settings) for problem in problems]
    outputs = max(C.shape[1] for _, C in parts)
    groups, start = [], 0
    for problem in problems:
        groups.append(problem.columns.cpu() + start)
        start += len(problem.W)
    H = torch.block_diag(*(H for H, _ in parts))
    C = torch.cat([pad(C, (0, outputs - C.shape[1])) for _, C in parts])
    return Objective(H, C, torch.cat(groups, 1))


def _weighed(problem: Problem, problems: Sequence[Problem], settings: Settings) -> tuple[torch.Tensor, torch.Tensor]:
    """`H` and `C` of one block's part in the objective, on the device of the first block."""
    root = problem.metric_root() if all(p.output_metric is not None for p in problems) else None
    total = problem.total()
    H, C, t = regularise(total, problem.W, settings.selection_shrinkage(total.rows, len(problem.W)), root)
    device = problems[0].W.device
    if root is None:
        C *= 1 / math.sqrt(t) if t > 0 else 0.0
    return H.to(device), C.to(device)


def _removal_costs(problems: Sequence[Problem], settings: Settings) -> torch.Tensor:
    """`(units,)` float64: what removing each unit alone takes from the objective.

    In one block it is `tr(V_g' P_gg^-1 V_g)` with `P = H^-1` and `V = P C`.
    """
    costs = torch.zeros(problems[0].units, dtype=torch.float64)
    for problem in problems:
        H, C = _weighed(problem, problems, settings)
        groups = problem.columns.to(H.device)
        factor, scale, _ = factorise(H)
        P = torch.cholesky_inverse(factor)
        V = torch.cholesky_solve(C.double() * scale[:, None], factor)[groups]
        costs += (V * torch.linalg.solve(P[groups[:, :, None], groups[:, None]], V)).sum((1, 2)).cpu()
    return costs
