"""Pivoted elimination in exact greedy order: the engine of forward selection and of backward elimination.

Given `H` `(n, n)` and `R = C` `(n, m)`, each step takes the pivot p of largest (or smallest) gain
`||R_p||^2 / D_pp`, where `D = H - L'L` is the Schur complement, and with `l = D_p / sqrt(D_pp)`,
`v = R_p / sqrt(D_pp)` updates `D <- D - l l'` and `R <- R - l v'`. Groups of columns pivot as blocks.
"""

import numpy as np
import torch

# Columns have a diagonal near one. A Schur complement below this multiple of the rounding error is noise: the column
# is a combination of those already taken.
_EXHAUSTED = 64.0
# Pivots in a panel.
_PANEL = 64
# Size of the pool from which a panel is speculated: at first, and per column that the last panel showed to matter.
_FIRST_POOL = 192
_POOL = 1.5
# Gains closer than this multiple of the rounding error are ties.
_TIE = 16.0
# In float32 a Schur complement below this part of the column is known to some four digits only: float64 from there on.
_DELICATE = 1e-3
# Wider problems stay in float32, in which they fit in memory.
_DOUBLE_BELOW = 4096


def eliminate(
    H: torch.Tensor,
    C: torch.Tensor,
    steps: int,
    *,
    dtype: torch.dtype,
    scale: torch.Tensor | None = None,
    smallest: bool = False,
    sample: int | None = None,
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`steps` single-column pivots, in panels, exactly as if they were taken one at a time.

    A panel is speculated on a pool of the best candidates, whose small matrices `D_QQ` and `R_Q R_Q'` hold all that
    choosing among them needs. The panel's rows of L then give, by matrix products, the gains of all columns before
    each of its steps; the panel is cut before the first step at which a column outside of the pool would have won.
    `D` is never formed: O(steps n (steps + m)) operations, nearly all of them in matrix products, and `steps n + n m`
    numbers of memory beside `H` and `C`, and beside a copy of `H` where it has another dtype.

    Args:
        H: `(n, n)` symmetric positive semi-definite.
        C: `(n, m)`.
        steps: Number of pivots, at most n.
        dtype: Of the computation; float32 gives way to float64 where that would not do, up to 4096 columns.
        scale: `(n,)`, factors that `H` (both sides) and `C` are multiplied by on reading.
        smallest: Take the smallest gain instead of the largest.
        sample: When given, each step looks at this many random columns only.
        generator: Of the random columns.

    Returns:
        `(steps,)` int64 pivots and their `(steps,)` float64 gains.
    """
    n, device = len(H), H.device
    scale = torch.ones(n, dtype=torch.float64, device=device) if scale is None else scale.double()
    left = _Remainder(H, C, scale, dtype, steps)
    order = torch.empty(steps, dtype=torch.int64, device=device)
    gains = torch.zeros(steps, dtype=torch.float64, device=device)
    free = torch.ones(n, dtype=torch.bool, device=device)
    sign, worst = (-1.0, float("inf")) if smallest else (1.0, 0.0)
    done, width, then_double = 0, _FIRST_POOL, False
    while done < steps:
        panel = min(_PANEL, steps - done)
        floor = 0.0 if smallest else _EXHAUSTED * max(torch.finfo(H.dtype).eps, torch.finfo(left.R.dtype).eps)
        norms = torch.linalg.vector_norm(left.R, dim=1).square_()
        gain = (norms / left.diagonal).masked_fill_(~free | (left.diagonal <= floor), worst)
        picks = None
        if sample is not None:
            picks = _samples(free, panel, sample, generator)
            pool = picks.unique()
        else:
            pool = (sign * gain).topk(min(max(width, panel), n - done)).indices
        chosen, chosen_gains, triangle = _speculate(
            *left.pool(pool), panel, floor, smallest, None if picks is None else torch.searchsorted(pool, picks)
        )
        if left.R.dtype != torch.float64 and n <= _DOUBLE_BELOW:
            firm = int((triangle.diagonal().square() >= _DELICATE).cumprod(0).sum())
            if firm < max(len(chosen), 1):  # in float64 from the first delicate pivot on, or where none is left
                chosen, chosen_gains, triangle = chosen[:firm], chosen_gains[:firm], triangle[:firm, :firm]
                then_double = True
        if len(chosen) == 0:
            if not then_double:  # nothing left adds anything
                break
            left, then_double = left.in_double(order[:done]), False
            continue
        pivots = pool[chosen]
        rows, v = left.panel(pivots, triangle)
        accepted = len(pivots)
        shrunk = rows.square().cumsum(0)
        if sample is None and accepted > 1:
            outside = free.index_fill(0, pool, False)
            accepted = _agreed(left, norms, rows, v, shrunk, chosen_gains, floor, sign, outside)
            # The next panel must look at what begins above the gain at which this one ends.
            needed = max(_PANEL, int((sign * gain > sign * chosen_gains[-1]).sum()))
            width = min(int(_POOL * needed), 2 * width)
        pivots = pivots[:accepted]
        order[done : done + accepted] = pivots
        gains[done : done + accepted] = chosen_gains[:accepted]
        free[pivots] = False
        done += accepted
        left.take(rows[:accepted], v[:accepted], shrunk[accepted - 1])
        if then_double:
            left, then_double = left.in_double(order[:done]), False
    if done < steps:
        rest = free.nonzero()[:, 0]
        order[done:] = rest[left.diagonal[rest].sort(descending=True, stable=True).indices[: steps - done]]
    return order, gains


class _Remainder:
    """What the pivots taken leave: `R` `(n, m)` and the diagonal of `D = H - L'L` in full, the rest on demand."""

    def __init__(self, H: torch.Tensor, C: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, steps: int):
        self._given = H, C, scale, steps
        self.H, self.scale = H.to(dtype), scale.to(dtype)
        self.R = C.to(dtype) * self.scale[:, None]
        self.diagonal = self.H.diagonal() * self.scale.square()
        self._L = torch.zeros(steps, len(H), dtype=dtype, device=H.device)
        self._done = 0

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

    def take(self, rows: torch.Tensor, v: torch.Tensor, shrunk: torch.Tensor) -> None:
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
            left.take(rows, v, rows.square().sum(0))
        return left


def _samples(free: torch.Tensor, panel: int, sample: int, generator: torch.Generator | None) -> torch.Tensor:
    """`(panel, sample)` random free columns, each row without repetition and never exhausted by the rows before it."""
    columns = free.nonzero()[:, 0]
    count = min(len(columns), max(sample, panel))
    noise = torch.rand(panel, len(columns), generator=generator)
    return columns[noise.topk(count, dim=1).indices.to(free.device)]


def _speculate(D, T, panel, floor, smallest, picks):
    """Up to `panel` greedy pivots within a pool, from `D` and `T = R R'` `(q, q)`.

    Returns their positions, gains, and the triangular factor of `D` on them. In NumPy and on the CPU: it is a long
    chain of operations on a few hundred numbers each, of which the calls would cost more than the arithmetic.
    """
    device = D.device
    D, T = D.cpu().numpy(), T.cpu().numpy()
    picks = None if picks is None else picks.cpu().numpy()
    pairs = np.zeros((panel, 2, len(D)))  # a step's row of L, and w with T <- T - row w' - w row'
    d, norms = D.diagonal().astype(np.float64), T.diagonal().astype(np.float64)
    best_of, worst = (np.argmin, np.inf) if smallest else (np.argmax, 0.0)
    spent = np.zeros(len(D), dtype=bool)
    chosen: list[int] = []
    gains = np.zeros(panel)
    for step in range(panel):
        spent |= d <= floor
        norms[spent], d[spent] = worst, 1.0
        value = norms / d
        p = int(best_of(value)) if picks is None else int(picks[step][best_of(value[picks[step]])])
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
    return (torch.from_numpy(x).to(device) for x in (np.array(chosen, dtype=np.int64), gains[:count], triangle))


def _agreed(left, norms, rows, v, shrunk, chosen_gains, floor, sign, outside):
    """Number of leading pivots of a speculated panel that no column outside of the pool beats at its step."""
    inner = v @ v.T
    # R.v as of each step, then what the step takes from ||R||^2
    lost = v @ left.R.T - inner.tril(-1) @ rows
    lost = lost.mul_(2).addcmul_(rows, inner.diagonal()[:, None], value=-1).mul_(rows).cumsum_(0)
    d = left.diagonal - shrunk[:-1]
    worst = float("inf") if sign < 0 else 0.0
    value = (norms - lost[:-1]).clamp_min_(0.0).div_(d).masked_fill_(~outside | (d <= floor), worst)
    best = value.amin(1) if sign < 0 else value.amax(1)
    taken, tie = chosen_gains[1:].to(best), _TIE * torch.finfo(best.dtype).eps
    beaten = (best < taken * (1 - tie)) if sign < 0 else (best > taken * (1 + tie))
    first = beaten.nonzero()
    return len(rows) if len(first) == 0 else int(first[0]) + 1


def eliminate_groups(
    H: torch.Tensor,
    C: torch.Tensor,
    groups: torch.Tensor,
    steps: int,
    *,
    scale: torch.Tensor | None = None,
    sets: int = 1,
    smallest: bool = False,
    sample: int | None = None,
    generator: torch.Generator | None = None,
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
        if sample is not None:
            candidates = _samples(free, 1, sample, generator)[0]
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
    factor[exhausted] = torch.eye(D.shape[1], dtype=D.dtype, device=D.device)
    K = torch.linalg.solve_triangular(factor, torch.eye(D.shape[1], dtype=D.dtype, device=D.device), upper=False)
    if exhausted.any():
        values, vectors = torch.linalg.eigh(D[exhausted])
        live = values > floor[exhausted].amax(1, keepdim=True)
        inverse = torch.where(live, values, float("inf")).rsqrt()
        K[exhausted] = inverse[:, :, None] * vectors.transpose(1, 2)
    return K
