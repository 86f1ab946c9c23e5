"""Solve one block from its moments: which units to keep, the new weights, and how good both are.

The tensor stages in their order: shrinkage, selection, reweighting, certificate. Tensors only.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from .certificates import certify
from .factorisation import factorise
from .importance import highest, scores
from .moments import Moments, combine
from .problem import columns_of
from .reweighting import cross_fit, relative_error, reweight
from .selection import select

# What selection uses before cross-fitting has chosen, and what is used when there are no two folds to cross-fit on.
PRIOR_SHRINKAGE = 0.1


@dataclass(frozen=True, eq=False)
class BlockSolution:
    """What to do to one block.

    Args:
        kept_units: `(k,)` int64, sorted.
        kept_columns: `(k * c,)` int64, sorted; the rows of `V`.
        V: `(k * c, m)`, the consumer's new weight, inputs by outputs.
        bias_shift: `(m,)`, to be added to the consumer's bias; zeros without one.
        shrinkage: lambda of the reweighting; infinity when the weights stay as they are.
        fitted_error: Relative error on all rows fitted on.
        method: How units were chosen: `"greedy"`, `"backward"`, `"stochastic"`, or the name of an importance.
        swaps: Number of exchanges made by swap refinement.
        swap_gain: What they added to the objective, as a fraction of the objective.
        jitter: Relative amount added to the diagonal for the factorisation to succeed.
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
    swaps: int
    swap_gain: float
    jitter: float
    guarantee: float | None


def regularise(
    moments: Moments, W: torch.Tensor, shrinkage: float, root: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """`(H + l I, (C + l W) root, t)` of the problem that selection solves, `l = shrinkage * mean(diag H)`.

    Args:
        moments: Of the block.
        W: `(n, m)`.
        shrinkage: lambda, finite.
        root: `(m, r)` with `M = root root'`; none weighs all outputs equally.

    Returns:
        `H` `(n, n)`, `C` `(n, m or r)`, and the squared error of keeping nothing. With a root it is that of the target
        `B W`, an approximation where the target is another model's.
    """
    W = W.to(moments.H)
    ridge = shrinkage * float(moments.H.diagonal().mean())
    H = moments.H.clone()
    H.diagonal().add_(ridge)
    C = moments.C + ridge * W
    if root is None:
        return H, C, moments.t + ridge * float(W.square().sum(dtype=torch.float64))
    C = C @ root.to(H)
    return H, C, float((W @ root.to(H)).mul(C).sum(dtype=torch.float64))


def metric_root(M: torch.Tensor) -> torch.Tensor:
    """`(m, m)` float64 root of a symmetric positive semi-definite `M` `(m, m)`: `M = root root'` to float32 precision.

    That is as much as sums of float32 gradients hold.
    """
    factor, scale, _ = factorise(M.float())
    return torch.where(scale > 0, 1 / scale, 0.0)[:, None] * factor


@dataclass(frozen=True, eq=False)
class Choice:
    """Units to keep in a block; the other fields are those of `BlockSolution`."""

    kept: torch.Tensor
    method: str
    swaps: int = 0
    swap_gain: float = 0.0
    guarantee: float | None = None


def choose(
    total: Moments,
    W: torch.Tensor,
    groups: torch.Tensor | None,
    k: int,
    *,
    sets: int = 1,
    shrinkage: float | str = "auto",
    importance: str = "greedy",
    method: str = "auto",
    swaps: int | None = None,
    output_metric: torch.Tensor | None = None,
    gradient: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Choice:
    """Choose the units that `solve_block` keeps; arguments are those that it has."""
    if importance != "greedy":
        ranked = scores(importance, total, W, groups=groups, gradient=gradient, generator=generator)
        return Choice(highest(ranked, k, sets), importance)
    H, C, t = _problem(total, W, shrinkage, output_metric)
    best = select(H, C, k, groups=groups, sets=sets, t=t, method=method, swaps=swaps, generator=generator)
    gain = best.swap_gain / best.objective if best.objective > 0 else 0.0
    return Choice(best.kept, best.method, best.swaps, gain, best.guarantee)


def _problem(
    total: Moments, W: torch.Tensor, shrinkage: float | str, output_metric: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """`H`, `C` and `t` that selection reads."""
    root = None if output_metric is None else metric_root(output_metric)
    return regularise(total, W, selection_shrinkage(shrinkage), root)


def selection_shrinkage(shrinkage: float | str) -> float:
    """lambda that selection uses, which is finite."""
    return PRIOR_SHRINKAGE if shrinkage == "auto" else min(float(shrinkage), 1e6)


def solve_block(
    folds: Sequence[Moments],
    total: Moments | None,
    W: torch.Tensor,
    groups: torch.Tensor | None,
    k: int,
    *,
    sets: int = 1,
    shrinkage: float | str = "auto",
    importance: str = "greedy",
    method: str = "auto",
    swaps: int | None = None,
    reweight_kept: bool = True,
    output_metric: torch.Tensor | None = None,
    gradient: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
    chosen: tuple[torch.Tensor, str] | None = None,
) -> BlockSolution:
    """Choose `k` units of a block and the weights on them.

    Args:
        folds: Moments of disjoint parts of the calibration rows; two or more for cross-fitting.
        total: Moments of all rows; combined from the folds when `None`.
        W: `(n, m)`, the consumer's weight, inputs by outputs.
        groups: `(units, c)` int64, columns of each unit; single columns when `None`.
        k: Number of units to keep; all of them leaves the block exactly as it is.
        sets: Units come in this many sets of equal size, one after the other, of each of which equally many are kept.
        shrinkage: lambda >= 0, or `"auto"` to cross-fit it.
        importance: `"greedy"` for selection by the objective, or a baseline of `importance.IMPORTANCES`.
        method: Of `selection.select`.
        swaps: Of `selection.select`.
        reweight_kept: Whether weights on the kept units are solved for; `False` keeps them, bias included.
        output_metric: `(m, m)`, `M` of `sensitivity.output_metrics`, which weighs outputs in selection.
        gradient: `(n,)`, for importance `"activation_gradient"`.
        generator: Of random choices.
        chosen: Units to keep, `(k,)` int64, sorted, and the method that chose them: for a block that must keep what
            others keep (`tied.choose_together`). Selection is left out.

    Raises:
        ValueError: `k`, a name or a shape does not fit.
        RuntimeError: the moments are not positive semi-definite.
    """

    def of_all_rows() -> Moments:
        return combine(folds) if total is None else total  # when it is needed: it is as large as a fold

    units = len(W) if groups is None else len(groups)
    if not 1 <= k <= units:
        raise ValueError(f"A block of {units} units can keep 1 to {units} of them, not {k}.")
    if k == units:
        every = torch.arange(units, device=W.device)
        columns = columns_of(every, groups)
        zero = torch.zeros_like(of_all_rows().target_mean)
        return BlockSolution(every, columns, W[columns], zero, math.inf, 0.0, "all", 0, 0.0, 0.0, 1.0)

    if chosen is None:
        choice = choose(
            of_all_rows(),
            W,
            groups,
            k,
            sets=sets,
            shrinkage=shrinkage,
            importance=importance,
            method=method,
            swaps=swaps,
            output_metric=output_metric,
            gradient=gradient,
            generator=generator,
        )
    else:
        choice = Choice(chosen[0].to(W.device), chosen[1])
        if importance == "greedy":
            H, C, _ = _problem(of_all_rows(), W, shrinkage, output_metric)
            choice = replace(choice, guarantee=certify(H, C, choice.kept, groups=groups).fraction)
            del H, C  # as large as a fold
    kept, used, guarantee = choice.kept, choice.method, choice.guarantee
    count, gain = choice.swaps, choice.swap_gain
    columns = columns_of(kept, groups)

    if not reweight_kept:
        whole = of_all_rows()
        V, zero = W.to(whole.H)[columns], torch.zeros_like(whole.target_mean)
        fitted = relative_error(whole, columns, V, zero)
        return BlockSolution(kept, columns, V, zero, math.inf, fitted, used, count, gain, 0.0, guarantee)
    lam = PRIOR_SHRINKAGE if shrinkage == "auto" else float(shrinkage)
    if shrinkage == "auto" and len(folds) > 1:
        lam = cross_fit(folds, W, columns).shrinkage
    whole = of_all_rows()
    new = reweight(whole, W, columns, lam)
    fitted = relative_error(whole, columns, new.V, new.bias_shift)
    return BlockSolution(kept, columns, new.V, new.bias_shift, lam, fitted, used, count, gain, new.jitter, guarantee)
