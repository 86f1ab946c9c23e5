"""The problem of one block, and the columns of its units. Tensors only."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from .factorisation import factorise
from .moments import Moments, combine
from .redundancy import Redundancy, redundancy


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

    @cached_property
    def redundancy(self) -> Redundancy:
        """Units that are dead, or copies of others."""
        return redundancy(self.total(), self.columns, self.sets)

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
