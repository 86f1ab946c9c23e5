"""What pivots leave of an elimination, of `D` and of `R`: as much as it takes to choose further ones. Tensors only."""

from dataclasses import dataclass

import torch

from .factorisation import add_symmetric

# Columns have a diagonal near one. A Schur complement below this multiple of the rounding error is noise: the column
# is a combination of those already taken.
EXHAUSTED = 64.0
# Gains closer than this multiple of the rounding error are ties.
_TIE = 16.0
# Matrices of the columns that are left are made smaller once no more than this part of them is left.
_STILL_LEFT = 0.8
# `R R'` is made anew once its largest entry is no more than this part of what it was.
_WORN = 1e-2


@dataclass(frozen=True, eq=False)
class Standing:
    """What each column would add where a panel begins.

    Args:
        norms: `(n,)`, `||R_j||^2`.
        gain: `(n,)`; the worst that there is for columns that are taken or exhausted.
        floor: Diagonals of `D` up to which a column is exhausted.
        sign: 1 where the largest gain is looked for, -1 where it is the smallest.
    """

    norms: torch.Tensor
    gain: torch.Tensor
    floor: float
    sign: float

    def best(self, count: int) -> torch.Tensor:
        """`(count,)` int64, the columns of the best gains."""
        return (self.sign * self.gain).topk(count).indices

    def above(self, gain: torch.Tensor) -> int:
        """Number of columns with a better gain."""
        return int((self.sign * self.gain > self.sign * gain).sum())

    def agreed(
        self,
        left: "Remainder",
        rows: torch.Tensor,
        v: torch.Tensor,
        shrunk: torch.Tensor,
        gains: torch.Tensor,
        outside: torch.Tensor,
    ) -> int:
        """Number of leading pivots of a speculated panel that no column outside of the pool beats at its step.

        Args:
            left: What the panel begins with.
            rows: `(p, n)`, the pivots' rows of `L`.
            v: `(p, m)`.
            shrunk: `(p, n)`, what the pivots up to each take from the diagonal.
            gains: `(p,)`, of the pivots.
            outside: `(n,)` bool, the free columns outside of the pool.
        """
        inner = v @ v.T
        # R.v as of each step, then what the step takes from ||R||^2
        lost = v @ left.R.T - inner.tril(-1) @ rows
        lost = lost.mul_(2).addcmul_(rows, inner.diagonal()[:, None], value=-1).mul_(rows).cumsum_(0)
        d = left.diagonal - shrunk[:-1]
        worst = float("inf") if self.sign < 0 else 0.0
        value = (self.norms - lost[:-1]).clamp_min_(0.0).div_(d).masked_fill_(~outside | (d <= self.floor), worst)
        best = value.amin(1) if self.sign < 0 else value.amax(1)
        taken, tie = gains[1:].to(best), _TIE * torch.finfo(best.dtype).eps
        beaten = (best < taken * (1 - tie)) if self.sign < 0 else (best > taken * (1 + tie))
        first = beaten.nonzero()
        return len(rows) if len(first) == 0 else int(first[0]) + 1


class Remainder:
    """What the pivots taken leave: `R` `(n, m)` and the diagonal of `D = H - L'L` in full, the rest on demand.

    Attributes:
        columns: `(q,)` int64, the columns that all is known of; `None` where that is made for those asked for.
    """

    columns: torch.Tensor | None = None

    def __init__(self, H: torch.Tensor, C: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, steps: int):
        self._given = H, C, scale, steps
        self.H, self.scale = H.to(dtype), scale.to(dtype)
        self.R = C.to(dtype) * self.scale[:, None]
        self.diagonal = self.H.diagonal() * self.scale.square()
        self._L = torch.zeros(steps, len(H), dtype=dtype, device=H.device)
        self._done = 0

    def of(self, columns: torch.Tensor) -> torch.Tensor:
        """The diagonal of `D` on some columns."""
        return self.diagonal[columns]

    def standing(self, free: torch.Tensor, smallest: bool) -> Standing:
        """What each of the free columns would add."""
        given, worst = self._given[0].dtype, float("inf") if smallest else 0.0
        floor = 0.0 if smallest else EXHAUSTED * max(torch.finfo(given).eps, torch.finfo(self.R.dtype).eps)
        norms = torch.linalg.vector_norm(self.R, dim=1).square_()
        gain = (norms / self.diagonal).masked_fill_(~free | (self.diagonal <= floor), worst)
        return Standing(norms, gain, floor, -1.0 if smallest else 1.0)

    def _scaled(self, rows: torch.Tensor, at: torch.Tensor | None = None) -> torch.Tensor:
        part = self.H[rows] if at is None else self.H[rows[:, None], at]
        return part.mul_(self.scale[rows, None]).mul_(self.scale if at is None else self.scale[at])

    def pool(self, columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`D` and `R R'` on some columns, `(q, q)`."""
        L, Rt = self._L[: self._done, columns], self.R[columns].T
        D, T = self._scaled(columns, columns), Rt.new_zeros(len(columns), len(columns))
        return add_symmetric(D, L, L, alpha=-1), add_symmetric(T, Rt, Rt)

    def panel(self, pivots: torch.Tensor, triangle: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The pivots' rows of `L` `(p, n)` and `v` `(p, m)`, given the triangular factor of `D` on them."""
        L, triangle = self._L[: self._done], triangle.to(self.R)
        rows = self._scaled(pivots).addmm_(L[:, pivots].T, L, alpha=-1)
        return (
            torch.linalg.solve_triangular(triangle, rows, upper=False),
            torch.linalg.solve_triangular(triangle, self.R[pivots], upper=False),
        )

    def take(self, pivots: torch.Tensor, rows: torch.Tensor, v: torch.Tensor, shrunk: torch.Tensor) -> None:
        """Eliminate the pivots of a panel; `shrunk` `(n,)` is what their rows take from the diagonal."""
        self._L[self._done : self._done + len(rows)] = rows
        self.R.addmm_(rows.T, v, alpha=-1)
        self.diagonal = self.diagonal - shrunk
        self._done += len(rows)

    def in_double(self, pivots: torch.Tensor) -> "Remainder":
        """What the same pivots leave, in float64."""
        H, C, scale, steps = self._given
        left = Remainder(H, C, scale, torch.float64, steps)
        if len(pivots):
            rows, v = left.panel(pivots, torch.linalg.cholesky(left._scaled(pivots, pivots)))
            left.take(pivots, rows, v, rows.square().sum(0))
        return left


class Whole(Remainder):
    """What the pivots taken leave of all columns that are left: `D` and `T = R R'` `(q, q)`, beside `R` `(q, m)`.

    Args:
        before: What they leave so far.
        free: `(n,)` bool, the columns that are left.
    """

    columns: torch.Tensor

    def __init__(self, before: Remainder, free: torch.Tensor):
        self._given = before._given
        self.columns = free.nonzero()[:, 0]
        self.D, self.T = before.pool(self.columns)
        self.R, self.diagonal = before.R[self.columns], before.diagonal[self.columns]
        self._left = torch.ones_like(self.columns, dtype=torch.bool)
        self._fresh = float(self.T.diagonal().amax())

    def of(self, columns: torch.Tensor) -> torch.Tensor:
        return self.diagonal[torch.searchsorted(self.columns, columns)]

    def standing(self, free: torch.Tensor, smallest: bool) -> Standing:
        return super().standing(free[self.columns], smallest)

    def pool(self, columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`D` and `R R'` on all columns."""
        return self.D, self.T

    def panel(self, pivots: torch.Tensor, triangle: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        at, triangle = torch.searchsorted(self.columns, pivots), triangle.to(self.R)
        return (
            torch.linalg.solve_triangular(triangle, self.D[at], upper=False),
            torch.linalg.solve_triangular(triangle, self.R[at], upper=False),
        )

    def take(self, pivots: torch.Tensor, rows: torch.Tensor, v: torch.Tensor, shrunk: torch.Tensor) -> None:
        # (R - rows' v)(R - rows' v)' is T - rows' w - w' rows
        w = (v @ self.R.T).addmm_(v @ v.T, rows, alpha=-0.5)
        add_symmetric(self.D, rows, rows, alpha=-1)
        add_symmetric(self.T, torch.cat([rows, w]), torch.cat([w, rows]), alpha=-1)
        self.R.addmm_(rows.T, v, alpha=-1)
        self.diagonal = self.diagonal - shrunk
        at = torch.searchsorted(self.columns, pivots)
        self.diagonal[at] = 0  # they are exhausted
        self._left[at] = False
        if int(self._left.sum()) < _STILL_LEFT * len(self._left):
            at = self._left.nonzero()[:, 0]
            self._left = self._left[at]
            self.columns, self.R, self.diagonal = self.columns[at], self.R[at], self.diagonal[at]
            self.D, self.T = self.D[at[:, None], at], self.T[at[:, None], at]
        self.D.diagonal().copy_(self.diagonal)
        norms = torch.linalg.vector_norm(self.R, dim=1).square_()
        largest = float(norms.amax()) if len(norms) else 0.0
        if largest < _WORN * self._fresh:  # what is left of T is of the size of its rounding errors
            torch.mm(self.R, self.R.T, out=self.T)
            self._fresh = largest
        self.T.diagonal().copy_(norms)
