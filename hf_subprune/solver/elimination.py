"""Pivoted elimination in exact greedy order: the engine of forward selection and of backward elimination.

Given `H` `(n, n)` and `R = C` `(n, m)`, each step takes the pivot p of largest (or smallest) gain
`||R_p||^2 / D_pp`, where `D = H - L'L` is the Schur complement, and with `l = D_p / sqrt(D_pp)`,
`v = R_p / sqrt(D_pp)` updates `D <- D - l l'` and `R <- R - l v'`. Groups of columns pivot as blocks.

Panels of pivots are looked for among a few columns as long as only few can win (`Remainder`), and among all that are
left where many come close (`Whole`).
"""

from dataclasses import dataclass

import numpy as np
import torch

from .remainder import EXHAUSTED, Remainder, Whole
from .settings import TUNING, Tuning

# In float32 a Schur complement below this part of the column is known to some four digits only: float64 from there on.
_DELICATE = 1e-3
# Wider problems stay in float32, in which they fit in memory.
_DOUBLE_BELOW = 4096
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
        tuning: All but `double_below`, `jointly` and `epsilon` are read.

    Returns:
        `(steps,)` int64 pivots and their `(steps,)` float64 gains.
    """
    n, device = len(H), H.device
    scale = torch.ones(n, dtype=torch.float64, device=device) if scale is None else scale.double()
    left = Remainder(H, C, scale, dtype, steps)
    order = torch.empty(steps, dtype=torch.int64, device=device)
    gains = torch.zeros(steps, dtype=torch.float64, device=device)
    free = torch.ones(n, dtype=torch.bool, device=device)
    done, width, then_double = 0, tuning.first_pool, False
    while done < steps:
        if draw is None and left.columns is None and width > tuning.whole * (n - done):
            left = Whole(left, free)
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
        order[done:] = rest[left.of(rest).sort(descending=True, stable=True).indices[: steps - done]]
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
    floor = EXHAUSTED * torch.finfo(H.dtype).eps * D.diagonal(dim1=1, dim2=2).abs()
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
