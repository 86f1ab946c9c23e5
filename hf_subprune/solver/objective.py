"""What selection maximises: the part of a block's output that new weights on some of its units can explain.

El Halabi et al. (NeurIPS 2022, arXiv 2203.04940) choose S and V in `min ||A W - B_S V||_F^2`, with `A` and `B`
`(rows, n)` the consumer's inputs in the original model and in the one pruned so far, and `W` `(n, m)` its weight. With
the best V for each S that is to maximise the weakly submodular `F(S) = ||A W||_F^2 - min_V ||A W - B_S V||_F^2 =
tr(C_S' H_SS^-1 C_S)`, for which the second moments `H = B'B` and `C = B'A W` are enough. Tensors only.
"""

import torch

from .factorisation import factorise
from .moments import Moments
from .problem import Problem, columns_of
from .settings import Settings


class Objective:
    """`F(S) = tr(C_S' H_SS^-1 C_S)` of sets S of units. It grows with S.

    Args:
        H: `(n, n)` symmetric positive semi-definite, with the shrinkage of selection already added.
        C: `(n, m)`, likewise; times a root of `M` where a metric `M` weighs errors.
        groups: `(units, c)` int64, columns of each unit; single columns when `None`.
        sets: Units come in this many sets of equal size, one after the other, of each of which equally many are
            chosen: a partition matroid.

    Raises:
        ValueError: a shape does not fit, an entry is not finite, or groups overlap or point outside of `H`.
    """

    def __init__(self, H: torch.Tensor, C: torch.Tensor, groups: torch.Tensor | None = None, sets: int = 1):
        n = H.shape[0]
        if H.ndim != 2 or H.shape[1] != n or C.ndim != 2 or C.shape[0] != n:
            raise ValueError(f"Moments must be H (n, n) and C (n, m), got {tuple(H.shape)} and {tuple(C.shape)}.")
        # Extremes pass on missing values, and unlike isfinite(H) they need no memory of the size of H.
        if not all(torch.isfinite(torch.stack(x.aminmax())).all() for x in (H, C) if x.numel()):
            raise ValueError("The moments hold infinite or missing values: check the calibration activations.")
        self.H, self.C, self.sets = H, C, sets
        self.groups = torch.arange(n, device=H.device)[:, None] if groups is None else _checked(groups, n).to(H.device)

    @property
    def units(self) -> int:
        """Number of units that there are."""
        return len(self.groups)

    def check(self, k: int) -> None:
        """Raise `ValueError` unless `k` units can be chosen, equally many of each set."""
        if not 0 <= k <= self.units:
            raise ValueError(f"A selection can keep 0 to {self.units} units, not {k}.")
        if self.units % self.sets or k % self.sets:
            raise ValueError(
                f"{self.units} units and the {k} to keep must be multiples of the {self.sets} sets they are in."
            )

    def columns(self, units: torch.Tensor) -> torch.Tensor:
        """Sorted columns of some units."""
        return columns_of(units, self.groups)

    def value(self, units: torch.Tensor) -> float:
        """`F` of a set of units, `(k,)` int64, in float64, by Cholesky; dependent columns add nothing.

        Raises:
            RuntimeError: `H` is not positive semi-definite.
        """
        columns = self.columns(units)
        factor, scale, _ = factorise(self.H[columns[:, None], columns])
        scaled = self.C[columns].double() * scale[:, None]
        return float(torch.linalg.solve_triangular(factor, scaled, upper=False).square().sum())


def _checked(groups: torch.Tensor, n: int) -> torch.Tensor:
    if groups.ndim != 2 or groups.numel() > n or groups.min() < 0 or groups.max() >= n:
        raise ValueError(f"Groups must be (units, c) columns below {n}, got shape {tuple(groups.shape)}.")
    if len(groups.unique()) != groups.numel():
        raise ValueError("Groups must not share columns.")
    return groups


def objective_of(problem: Problem, settings: Settings) -> Objective:
    """The objective of a block, with its metric, and with the shrinkage of selection.

    Units that are dead or copies add nothing to it: the first unit of a copy stands for both.
    """
    redundant, total = problem.redundancy, problem.total()
    shrinkage = settings.selection_shrinkage(total.rows, len(problem.W))
    H, C, _ = regularise(total, redundant.folded(problem.W), shrinkage, problem.metric_root())
    silent = redundant.columns
    if len(silent):
        mean = H.diagonal().mean()
        H[silent], H[:, silent], C[silent] = 0, 0, 0
        H[silent, silent] = mean
    return Objective(H, C, problem.groups, problem.sets)


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
