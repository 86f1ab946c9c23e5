"""Pivoted elimination in exact greedy order: the engine of forward selection and of backward elimination.

Given `H` `(n, n)` and `R = C` `(n, m)`, each step takes the pivot p of largest (or smallest) gain
`||R_p||^2 / D_pp`, where `D = H - L'L` is the Schur complement, and with `l = D_p / sqrt(D_pp)`,
`v = R_p / sqrt(D_pp)` updates `D <- D - l l'` and `R <- R - l v'`. Groups of columns pivot as blocks.

Panels of pivots are looked for among a few columns as long as only few can win (`_Remainder`), and among all that are
left where many come close (`_Whole`).
"""

from dataclasses import dataclass

import numpy as np
import torch

from .settings import TUNING, Tuning

# Columns have a diagonal near one. A Schur complement below this multiple of the rounding error is noise: the column
# is a combination of those already taken.
_EXHAUSTED = 64.0
# Gains closer than this multiple of the rounding error are ties.
_TIE = 16.0
# In float32 a Schur complement below this part of the column is known to some four digits only: float64 from there on.
_DELICATE = 1e-3
# Wider problems stay in float32, in which they fit in memory.
_DOUBLE_BELOW = 4096
# Matrices of the columns that are left are made smaller once no more than this part of them is left.
_STILL_LEFT = 0.8
# `R R'` is made anew once its largest entry is no more than this part of what it was.
_WORN = 1e-2
# Within larger pools a panel is in the precision of its matrices.
_DOUBLE_POOL = 1024


@dataclass(frozen=True, eq=False)
class Draw:
    """Random candidates, for stochastic greedy: each step looks at a few only.

    Args:
        count: Number of candidates a step.
        generator: Of random numbers.
    """

    count: int
    generator: torch.Generator | None

    def of(self, free: torch.Tensor, steps: int) -> torch.Tensor:
        """`(steps, count)` of those that are free, each row without repetition and never exhausted by those before."""
        columns = free.nonzero()[:, 0]
        count = min(len(columns), max(self.count, steps))
        noise = torch.rand(steps, len(columns), generator=self.generator)
        return columns[noise.topk(count, dim=1).indices.to(free.device)]


def eliminate(
    H: torch.Tensor,
    C: torch.Tensor,
    steps: int,
    *,
    dtype: torch.dtype,
    scale: torch.Tensor | None = None,
    smallest: bool = False,
    draw: Draw | None = None,
    tuning: Tuning = TUNING,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`steps` single-column pivots, in panels, exactly as if they were taken one at a time.

    A panel is speculated on a pool of the best candidates, whose small matrices `D_QQ` and `R_Q R_Q'` hold all that
    choosing among them needs. The panel's rows of L then give, by matrix products, the gains of all columns before
    each of its steps; the panel is cut before the first step at which a column outside of the pool would have won.
    `D` is not formed as long as the pool is small: O(steps n (steps + m)) operations, nearly all of them in matrix
    products, and `steps n + n m` numbers of memory beside `H` and `C`, and beside a copy of `H` where it has another
    dtype. Where gains are so close that the pool would be a large part of all columns, `D` and `R R'` of the columns
    that are left are kept instead, and nothing is speculated: O(n^2 (steps + m)) operations, `2 n^2` numbers more.

    Args:
        H: `(n, n)` symmetric positive semi-definite.
        C: `(n, m)`.
        steps: Number of pivots, at most n.
        dtype: Of the computation; float32 gives way to float64 where that would not do, up to 4096 columns.
        scale: `(n,)`, factors that `H` (both sides) and `C` are multiplied by on reading.
        smallest: Take the smallest gain instead of the largest.
        draw: When given, each step looks at so many random columns only.
        tuning: `panel`, `first_pool` and `pool` are read.

    Returns:
        `(steps,)` int64 pivots and their `(steps,)` float64 gains.
    """
    n, device = len(H), H.device
    scale = torch.ones(n, dtype=torch.float64, device=device) if scale is None else scale.double()
    left = _Remainder(H, C, scale, dtype, steps)
    order = torch.empty(steps, dtype=torch.int64, device=device)
    gains = torch.zeros(steps, dtype=torch.float64, device=device)
    free = torch.ones(n, dtype=torch.bool, device=device)
    done, width, then_double = 0, tuning.first_pool, False
    while done < steps:
        if draw is None and left.columns is None and width > tuning.whole * (n - done):
            left = _Whole(left, free)
        most = min(tuning.panel if left.columns is None else tuning.whole_panel, steps - done)
        start = left.standing(free, smallest)
        picks = None if draw is None else draw.of(free, most)
        if left.columns is not None:
            pool = left.columns
        else:
            pool = start.best(min(max(width, most), n - done)) if picks is None else picks.unique()
        among = None if picks is None else torch.searchsorted(pool, picks)
        panel = _speculate(*left.pool(pool), most, start.floor, smallest, among)
        if left.R.dtype != torch.float64 and n <= _DOUBLE_BELOW:
            firm = panel.firm()
            if firm < max(len(panel.chosen), 1):  # in float64 from the first delicate pivot on, or where none is left
                panel, then_double = panel.cut(firm), True
        if len(panel.chosen) == 0:
            if not then_double:  # nothing left adds anything
                break
            left, then_double = left.in_double(order[:done]), False
            continue
        pivots = pool[panel.chosen]
        rows, v = left.panel(pivots, panel.triangle)
        accepted = len(pivots)
        shrunk = rows.square().cumsum(0)
        if draw is None and accepted > 1 and left.columns is None:
            outside = free.index_fill(0, pool, False)
            accepted = start.agreed(left, rows, v, shrunk, panel.gains, outside)
            # The next panel must look at what begins above the gain at which this one ends.
            width = min(int(tuning.pool * max(tuning.panel, start.above(panel.gains[-1]))), 2 * width)
        pivots = pivots[:accepted]
        order[done : done + accepted] = pivots
        gains[done : done + accepted] = panel.gains[:accepted]
        free[pivots] = False
        done += accepted
        left.take(pivots, rows[:accepted], v[:accepted], shrunk[accepted - 1])
        if then_double:
            left, then_double = left.in_double(order[:done]), False
    if done < steps:
        rest = free.nonzero()[:, 0]
        order[done:] = rest[left.diagonal[rest].sort(descending=True, stable=True).indices[: steps - done]]
    return order, gains


@dataclass(frozen=True, eq=False)
class _Panel:
    """Pivots speculated within a pool.

    Args:
        chosen: `(p,)` int64, positions in the pool.
        gains: `(p,)` float64.
        triangle: `(p, p)` float64, the triangular factor of `D` on them.
    """

    chosen: torch.Tensor
    gains: torch.Tensor
    triangle: torch.Tensor

    def firm(self) -> int:
        """Number of leading pivots whose Schur complements hold enough digits in float32."""
        return int((self.triangle.diagonal().square() >= _DELICATE).cumprod(0).sum())

    def cut(self, count: int) -> "_Panel":
        """The first pivots only."""
        return _Panel(self.chosen[:count], self.gains[:count], self.triangle[:count, :count])


@dataclass(frozen=True, eq=False)
class _Standing:
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
        left: "_Remainder",
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


class _Remainder:
    """What the pivots taken leave: `R` `(n, m)` and the diagonal of `D = H - L'L` in full, the rest on demand.

    Attributes:
        columns: `(q,)` int64, the columns that all is known of; `None` where that is made for those that are asked for.
    """

    columns: torch.Tensor | None = None

    def __init__(self, H: torch.Tensor, C: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, steps: int):
        self._given = H, C, scale, steps
        self.H, self.scale = H.to(dtype), scale.to(dtype)
        self.R = C.to(dtype) * self.scale[:, None]
        self.diagonal = self.H.diagonal() * self.scale.square()
        self._L = torch.zeros(steps, len(H), dtype=dtype, device=H.device)
        self._done = 0

    def standing(self, free: torch.Tensor, smallest: bool) -> _Standing:
        """What each of the free columns would add."""
        given, worst = self._given[0].dtype, float("inf") if smallest else 0.0
        floor = 0.0 if smallest else _EXHAUSTED * max(torch.finfo(given).eps, torch.finfo(self.R.dtype).eps)
        norms = torch.linalg.vector_norm(self.R, dim=1).square_()
        gain = (norms / self.diagonal).masked_fill_(~free | (self.diagonal <= floor), worst)
        return _Standing(norms, gain, floor, -1.0 if smallest else 1.0)

    def _scaled(self, rows: torch.Tensor, at: torch.Tensor | None = None) -> torch.Tensor:
        part = self.H[rows] if at is None else self.H[rows[:, None], at]
        return part.mul_(self.scale[rows, None]).mul_(self.scale if at is None else self.scale[at])

    def pool(self, columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`D` and `R R'` on some columns, `(q, q)`."""
        L, R = self._L[: self._done, columns], self.R[columns]
        return self._scaled(columns, columns).addmm_(L.T, L, alpha=-1), R @ R.T

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

    def in_double(self, pivots: torch.Tensor) -> "_Remainder":
        """What the same pivots leave, in float64."""
        H, C, scale, steps = self._given
        left = _Remainder(H, C, scale, torch.float64, steps)
        if len(pivots):
            rows, v = left.panel(pivots, torch.linalg.cholesky(left._scaled(pivots, pivots)))
            left.take(pivots, rows, v, rows.square().sum(0))
        return left


class _Whole(_Remainder):
    """What the pivots taken leave of all columns that are left: `D` and `T = R R'` `(q, q)`, beside `R` `(q, m)`.

    Args:
        before: What they leave so far.
        free: `(n,)` bool, the columns that are left.
    """

    columns: torch.Tensor

    def __init__(self, before: _Remainder, free: torch.Tensor):
        self._given = before._given
        self.columns = free.nonzero()[:, 0]
        self.D, self.T = before.pool(self.columns)
        self.R, self.diagonal = before.R[self.columns], before.diagonal[self.columns]
        self._fresh = float(self.T.diagonal().amax())

    def standing(self, free: torch.Tensor, smallest: bool) -> _Standing:
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
        self.D.addmm_(rows.T, rows, alpha=-1)
        self.T.addmm_(torch.cat([rows, w]).T, torch.cat([w, rows]), alpha=-1)
        self.R.addmm_(rows.T, v, alpha=-1)
        self.diagonal = self.diagonal - shrunk
        self.diagonal[torch.searchsorted(self.columns, pivots)] = 0  # they are exhausted
        left = self.diagonal != 0
        if int(left.sum()) < _STILL_LEFT * len(left):
            at = left.nonzero()[:, 0]
            self.columns, self.R, self.diagonal = self.columns[at], self.R[at], self.diagonal[at]
            self.D, self.T = self.D[at[:, None], at], self.T[at[:, None], at]
        self.D.diagonal().copy_(self.diagonal)
        norms = torch.linalg.vector_norm(self.R, dim=1).square_()
        largest = float(norms.amax()) if len(norms) else 0.0
        if largest < _WORN * self._fresh:  # what is left of T is of the size of its rounding errors
            torch.mm(self.R, self.R.T, out=self.T)
            self._fresh = largest
        self.T.diagonal().copy_(norms)


def _speculate(
    D_pool: torch.Tensor, T_pool: torch.Tensor, most: int, floor: float, smallest: bool, picks: torch.Tensor | None
) -> _Panel:
    """Up to `most` greedy pivots within a pool, from `D` and `T = R R'` `(q, q)` on it.

    In NumPy and on the CPU: it is a long chain of operations on a few hundred numbers each, of which the calls would
    cost more than the arithmetic.

    Args:
        D_pool: `(q, q)`.
        T_pool: `(q, q)`.
        most: Number of pivots.
        floor: Diagonals up to which a column is exhausted.
        smallest: Take the smallest gain instead of the largest.
        picks: `(most, count)` int64, positions in the pool that each step looks at; all when `None`.
    """
    D, T = D_pool.cpu().numpy(), T_pool.cpu().numpy()
    among = None if picks is None else picks.cpu().numpy()
    # A step's row of L, and w with T <- T - row w' - w row'.
    pairs = np.zeros((most, 2, len(D)), dtype=np.float64 if len(D) <= _DOUBLE_POOL else D.dtype)
    d, norms = D.diagonal().astype(np.float64), T.diagonal().astype(np.float64)
    best_of, worst = (np.argmin, np.inf) if smallest else (np.argmax, 0.0)
    spent = np.zeros(len(D), dtype=bool)
    chosen: list[int] = []
    gains = np.zeros(most)
    for step in range(most):
        spent |= d <= floor
        norms[spent], d[spent] = worst, 1.0
        value = norms / d
        p = int(best_of(value)) if among is None else int(among[step][best_of(value[among[step]])])
        if not smallest and value[p] <= 0:
            break
        root, gains[step] = np.sqrt(d[p]), value[p]
        before = pairs[:step].reshape(2 * step, len(D))
        row = (D[p] - pairs[:step, 0, p] @ pairs[:step, 0]) / root
        u = (T[p] - pairs[:step, ::-1, p].reshape(-1) @ before) / root
        w = u - (0.5 * value[p]) * row  # ||v||^2 is the gain
        pairs[step, 0], pairs[step, 1] = row, w
        d -= row * row
        norms -= 2 * row * w
        np.maximum(norms, 0.0, out=norms)
        spent[p] = True
        chosen.append(p)
    count = len(chosen)
    triangle = np.tril(pairs[:count, 0][:, chosen].T)
    found = (torch.from_numpy(x).to(D_pool.device) for x in (np.array(chosen, np.int64), gains[:count], triangle))
    return _Panel(*found)


def eliminate_groups(
    H: torch.Tensor,
    C: torch.Tensor,
    groups: torch.Tensor,
    steps: int,
    *,
    scale: torch.Tensor | None = None,
    sets: int = 1,
    smallest: bool = False,
    draw: Draw | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`steps` pivots of groups of columns, whose gain is `tr(R_g' D_gg^-1 R_g)`, in float64.

    Only the diagonal blocks of `D` are kept; O(steps (n c (steps c + m + c))) operations.

    Args:
        groups: `(units, c)` int64, disjoint.
        sets: Units come in this many sets, one after the other; each gives `steps / sets` pivots.
        Others: see `eliminate`.

    Returns:
        `(steps,)` int64 units and their `(steps,)` float64 gains.
    """
    units, c = groups.shape
    n, device = len(H), H.device
    scale = torch.ones(n, dtype=torch.float64, device=device) if scale is None else scale.double()
    R = C.double() * scale[:, None]
    blocks = (slice(None), slice(None), None), (slice(None), None, slice(None))
    D = H[groups[blocks[0]], groups[blocks[1]]].double() * scale[groups][blocks[0]] * scale[groups][blocks[1]]
    floor = _EXHAUSTED * torch.finfo(H.dtype).eps * D.diagonal(dim1=1, dim2=2).abs()
    L = R.new_zeros(steps * c, n)
    order = torch.empty(steps, dtype=torch.int64, device=device)
    gains = R.new_zeros(steps)
    free = torch.ones(units, dtype=torch.bool, device=device)
    size, taken = units // sets, [0] * sets
    for step in range(steps):
        candidates = free.nonzero()[:, 0]
        if draw is not None:
            candidates = draw.of(free, 1)[0]
        whiten = _whiteners(D[candidates], floor[candidates])
        gain = (whiten @ R[groups[candidates]]).square().sum((1, 2))
        best = int(gain.argmin() if smallest else gain.argmax())
        unit = int(candidates[best])
        pivot = groups[unit]
        done = L[: step * c]
        rows = H[pivot].double() * scale[pivot, None] * scale - done[:, pivot].T @ done
        rows, v = whiten[best] @ rows, whiten[best] @ R[pivot]
        L[step * c : (step + 1) * c] = rows
        R.addmm_(rows.T, v, alpha=-1)
        part = rows[:, groups].permute(1, 0, 2)  # (units, c of the pivot, c)
        D.baddbmm_(part.transpose(1, 2), part, alpha=-1)
        order[step], gains[step], free[unit] = unit, gain[best], False
        taken[unit // size] += 1
        if taken[unit // size] == steps // sets:
            free[unit // size * size : (unit // size + 1) * size] = False
    return order, gains


def _whiteners(D: torch.Tensor, floor: torch.Tensor) -> torch.Tensor:
    """`(units, c, c)` K with `K D K' = I`, but for directions of D at or below the floor, whose rows of K are zero."""
    factor, info = torch.linalg.cholesky_ex(D)
    exhausted = (info != 0) | (factor.diagonal(dim1=1, dim2=2).square() <= floor).any(1)
    one = torch.eye(D.shape[1], dtype=D.dtype, device=D.device)
    factor[exhausted] = one
    K: torch.Tensor = torch.linalg.solve_triangular(factor, one, upper=False)
    if exhausted.any():
        values, vectors = torch.linalg.eigh(D[exhausted])
        live = values > floor[exhausted].amax(1, keepdim=True)
        inverse = torch.where(live, values, float("inf")).rsqrt()
        K[exhausted] = inverse[:, :, None] * vectors.transpose(1, 2)
    return K
