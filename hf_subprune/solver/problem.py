"""The problem of one block, and what selection, certificates and reweighting share: columns of units, and checks."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .factorisation import factorise
from .moments import Moments, combine


@dataclass(frozen=True, eq=False)
class Problem:
    """What there is to know of one block: the moments of its consumer's inputs, and the consumer's weight.

    Args:
        folds: Moments of disjoint parts of the calibration rows; two or more for cross-fitting.
        W: `(n, m)`, the consumer's weight, inputs by outputs.
        groups: `(units, c)` int64, columns of each unit; single columns when `None`.
        output_metric: `(m, m)`, `M`, the second moments of the loss's gradients at the consumer's output, which weigh
            outputs in selection; `None` weighs all outputs equally.
        sets: Units come in this many sets of equal size, one after the other, of each of which equally many are kept.
        gradient: `(n,)`, mean `|activation x gradient|` of each column, for importance `"activation_gradient"`.
    """

    folds: Sequence[Moments]
    W: torch.Tensor
    groups: torch.Tensor | None = None
    output_metric: torch.Tensor | None = None
    sets: int = 1
    gradient: torch.Tensor | None = None

    @property
    def units(self) -> int:
        """Number of units that there are."""
        return len(self.W) if self.groups is None else len(self.groups)

    @property
    def columns(self) -> torch.Tensor:
        """`(units, c)` int64, columns of each unit."""
        return torch.arange(len(self.W), device=self.W.device)[:, None] if self.groups is None else self.groups

    def total(self) -> Moments:
        """Moments of all rows, as large as a fold: made where they are needed, and let go of."""
        return combine(self.folds)

    def metric_root(self) -> torch.Tensor | None:
        """`(m, m)` float64, the root of the metric; `None` without one."""
        return None if self.output_metric is None else metric_root(self.output_metric)


def metric_root(M: torch.Tensor) -> torch.Tensor:
    """`(m, m)` float64 root of a symmetric positive semi-definite `M` `(m, m)`: `M = root root'` to float32 precision.

    That is as much as sums of float32 gradients hold.
    """
    factor, scale, _ = factorise(M.float())
    return torch.where(scale > 0, 1 / scale, 0.0)[:, None] * factor


def columns_of(units: torch.Tensor, groups: torch.Tensor | None) -> torch.Tensor:
    """Sorted columns of units: `units` themselves without groups, else the sorted entries of `groups[units]`."""
    return units if groups is None else groups.to(units.device)[units].reshape(-1).sort().values


def check_problem(H: torch.Tensor, C: torch.Tensor, groups: torch.Tensor | None = None) -> torch.Tensor:
    """The groups `(units, c)` of a selection problem, after checking that its tensors fit together.

    Raises:
        ValueError: a shape does not fit, an entry is not finite, or groups overlap or point outside of `H`.
    """
    n = H.shape[0]
    if H.ndim != 2 or H.shape[1] != n or C.ndim != 2 or C.shape[0] != n:
        raise ValueError(f"Moments must be H (n, n) and C (n, m), got {tuple(H.shape)} and {tuple(C.shape)}.")
    # Extremes pass on missing values, and unlike isfinite(H) they need no memory of the size of H.
    if not all(torch.isfinite(torch.stack(x.aminmax())).all() for x in (H, C) if x.numel()):
        raise ValueError("The moments hold infinite or missing values: check the calibration activations.")
    if groups is None:
        return torch.arange(n, device=H.device)[:, None]
    if groups.ndim != 2 or groups.numel() > n or groups.min() < 0 or groups.max() >= n:
        raise ValueError(f"Groups must be (units, c) columns below {n}, got shape {tuple(groups.shape)}.")
    if len(groups.unique()) != groups.numel():
        raise ValueError("Groups must not share columns.")
    return groups.to(H.device)
