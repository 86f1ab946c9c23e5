"""Units that say nothing which others do not: dead ones, and copies of one another. Tensors only.

A ridge towards the original weights makes a column look worth what its own weights are, whether it says anything or
not. So what reads a copy is added to what reads its first, and what reads a dead unit is nothing: the function is the
same on the calibration rows, and the copies and the dead cost nothing to remove.
"""

from dataclasses import dataclass

import torch

from .moments import Moments

DEAD = -1
"""In place of the first unit of a copy: the unit is zero, or constant where there is an intercept."""

# What remains of a column's energy beside its mean, or beside another column, is rounding up to this.
_CONSTANT, _EQUAL = 1e-9, 1e-5
# With fewer rows, columns are multiples of one another by chance.
_FEWEST_ROWS = 16
# Columns that are compared with all others at a time: no second matrix of the size of the moments is made.
_PANEL = 512


@dataclass(frozen=True, eq=False)
class Redundancy:
    """Which units are copies of which.

    Args:
        first: `(units,)` int64: the first unit of which a unit is a copy, itself where it is none, `DEAD` if it is.
        ratio: `(n,)` float64: a column is as much of the same column of its first unit; 1 for what says nothing.
        groups: `(units, c)` int64, columns of each unit.
    """

    first: torch.Tensor
    ratio: torch.Tensor
    groups: torch.Tensor

    @property
    def columns(self) -> torch.Tensor:
        """Columns of units that are dead or copies, `(k,)` int64."""
        return self.groups[self.first != torch.arange(len(self.first), device=self.first.device)].flatten()

    def folded(self, W: torch.Tensor, kept: torch.Tensor | None = None) -> torch.Tensor:
        """`(n, m)`: weights that compute the same, without those of copies and of the dead.

        Args:
            W: `(n, m)`; returned itself where nothing is redundant.
            kept: `(k,)` int64, units of which one of each family gets all weights; the first of all without it.
        """
        own = torch.arange(len(self.first), device=self.first.device)
        if bool((self.first == own).all()):
            return W
        heir = own.clone()
        if kept is not None:
            # The first kept one of a family: of several writes to one place, the last would count.
            for unit in kept.tolist()[::-1]:
                if self.first[unit] != DEAD:
                    heir[self.first[unit]] = unit
        source, target = self.groups, self.groups[heir[self.first.clamp(min=0)]]
        share = torch.where((self.first == DEAD)[:, None], 0.0, self.ratio[source] / self.ratio[target])
        source, result = source.flatten(), W.clone()
        result[source] = 0
        return result.index_add_(0, target.flatten(), (share.view(-1, 1) * W[source]).to(W))


def redundancy(moments: Moments, groups: torch.Tensor, sets: int = 1) -> Redundancy:
    """Look for dead units and copies among the columns of a consumer.

    Args:
        moments: Of its inputs.
        groups: `(units, c)` int64, columns of each unit.
        sets: Units come in this many sets, one after the other; copies are looked for within each.
    """
    H, units = moments.H, len(groups)
    groups = groups.to(H.device)
    energy = H.diagonal().double()
    raw = energy + moments.rows * moments.input_mean.double().square() if moments.intercept else energy
    still = energy <= _CONSTANT * raw
    dead = still[groups].all(1)
    first = torch.arange(units, device=H.device)
    ratio = torch.ones(len(H), dtype=torch.float64, device=H.device)
    size = units // sets
    norm = energy.clamp_min(torch.finfo(torch.float64).tiny).sqrt()
    for start in range(0, units if moments.rows >= _FEWEST_ROWS else 0, _PANEL):
        rows = torch.arange(start, min(start + _PANEL, units), device=H.device)
        if not _any_near(H, groups[:, 0], rows, norm, still):
            continue
        equal = torch.ones(len(rows), units, dtype=torch.bool, device=H.device)
        for column in groups.T:  # the same column of each unit
            cosine = H[column[rows][:, None], column].double() / norm[column[rows], None] / norm[column]
            equal &= (cosine.abs() >= 1 - _EQUAL) | (still[column[rows], None] & still[column])
        equal &= ~dead & (torch.arange(units, device=H.device) // size == (rows // size)[:, None])
        equal[torch.arange(len(rows), device=H.device), rows] = True
        first[rows] = equal.int().argmax(1)
    first = torch.where(dead, DEAD, first[first])
    of = groups[first.clamp(min=0)]
    found = H[groups, of].double() / energy[of].clamp_min(torch.finfo(torch.float64).tiny)
    ratio[groups.flatten()] = torch.where((first == DEAD)[:, None] | still[groups], 1.0, found).flatten()
    return Redundancy(first, ratio, groups)


def _any_near(
    H: torch.Tensor, columns: torch.Tensor, rows: torch.Tensor, norm: torch.Tensor, still: torch.Tensor
) -> bool:
    """Whether the first column of one of some units may be a multiple of that of another unit, or says nothing.

    In float32, on twice the distance: it tells most blocks apart from those that hold copies.
    """
    own = columns[rows]
    if bool(still[own].any()):
        return True
    every = len(columns) == len(H)
    cosine, others = (H[own], norm) if every else (H[own][:, columns], norm[columns])
    cosine = cosine.float().mul_((1 / norm[own]).float()[:, None]).mul_((1 / others).float())
    near = int((cosine.abs_() >= 1 - 2 * _EQUAL).sum())
    return near > len(rows)
