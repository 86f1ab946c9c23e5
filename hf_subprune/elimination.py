"""Pivoted elimination in exact greedy order: the engine of forward selection and of backward elimination.

Given `H` `(n, n)` and `R = C` `(n, m)`, each step takes the pivot p of largest (or smallest) gain
`||R_p||^2 / D_pp`, where `D = H - L'L` is the Schur complement, and with `l = D_p / sqrt(D_pp)`,
`v = R_p / sqrt(D_pp)` updates `D <- D - l l'` and `R <- R - l v'`. Groups of columns pivot as blocks.
"""

import torch

# Columns have a diagonal near one. A Schur complement below this multiple of the rounding error is noise: the column
# is a combination of those already taken.
_EXHAUSTED = 64.0
# Pivots in a panel, and candidates per pivot of the pool from which a panel is speculated.
_PANEL = 64
_POOL = 3
# Gains closer than this multiple of the rounding error are ties.
_TIE = 16.0


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
    `H` is only read, a panel of rows at a time, and `D` never formed: O(steps n (steps + m)) operations, nearly all
    of them in matrix products, and `steps n + n m` numbers of memory beside `H` and `C`.

    Args:
        H: `(n, n)` symmetric positive semi-definite.
        C: `(n, m)`.
        steps: Number of pivots, at most n.
        dtype: Of the computation.
        scale: `(n,)`, factors that `H` (both sides) and `C` are multiplied by on reading.
        smallest: Take the smallest gain instead of the largest.
        sample: When given, each step looks at this many random columns only.
        generator: Of the random columns.

    Returns:
        `(steps,)` int64 pivots and their `(steps,)` float64 gains.
    """
    n = len(H)
    device = H.device
    scale = torch.ones(n, dtype=dtype, device=device) if scale is None else scale.to(dtype)
    R = C.to(dtype) * scale[:, None]
    diagonal = H.diagonal().to(dtype) * scale.square()
    floor = 0.0 if smallest else _EXHAUSTED * max(torch.finfo(H.dtype).eps, torch.finfo(dtype).eps)
    tie = _TIE * torch.finfo(dtype).eps
    L = torch.zeros(steps, n, dtype=dtype, device=device)
    order = torch.empty(steps, dtype=torch.int64, device=device)
    gains = torch.zeros(steps, dtype=torch.float64, device=device)
    free = torch.ones(n, dtype=torch.bool, device=device)
    worst = torch.tensor(float("inf") if smallest else 0.0, dtype=dtype, device=device)
    sign = -1.0 if smallest else 1.0
    done, width = 0, _PANEL * _POOL
    while done < steps:
        panel = min(_PANEL, steps - done)
        norms = torch.linalg.vector_norm(R, dim=1).square_()
        gain = torch.where(free & (diagonal > floor), norms / diagonal, worst)
        picks = None
        if sample is not None:
            picks = _samples(free, panel, sample, generator)
            pool = picks.unique()
        else:
            pool = (sign * gain).topk(min(max(width, panel), n - done)).indices
        chosen, chosen_gains, triangle = _speculate(
            (
                H[pool[:, None], pool].to(dtype) * scale[pool, None] * scale[pool] - L[:done, pool].T @ L[:done, pool]
            ).double(),
            (R[pool] @ R[pool].T).double(),
            panel,
            floor,
            smallest,
            None if picks is None else torch.searchsorted(pool, picks),
        )
        if len(chosen) == 0:  # nothing left adds anything
            break
        pivots = pool[chosen]
        # Rows of L and of V for the panel: its own triangle first, then everything else at once.
        rows = H[pivots].to(dtype) * scale[pivots, None] * scale - L[:done, pivots].T @ L[:done]
        triangle = triangle.to(dtype)
        rows = torch.linalg.solve_triangular(triangle, rows, upper=False)
        v = torch.linalg.solve_triangular(triangle, R[pivots], upper=False)
        accepted = len(pivots)
        shrunk = rows.square().cumsum(0)
        if sample is None and accepted > 1:
            accepted = _agreed(R, norms, diagonal, gain, rows, v, shrunk, pivots, chosen_gains, floor, tie, sign, free)
            width = min(2 * width, n) if accepted < panel // 2 else max(_PANEL * _POOL, width * 3 // 4)
        rows, v = rows[:accepted], v[:accepted]
        L[done : done + accepted] = rows
        R.addmm_(rows.T, v, alpha=-1)
        diagonal = diagonal - shrunk[accepted - 1]
        order[done : done + accepted] = pivots[:accepted]
        gains[done : done + accepted] = chosen_gains[:accepted]
        free[pivots[:accepted]] = False
        done += accepted
    if done < steps:
        rest = free.nonzero()[:, 0]
        order[done:] = rest[diagonal[rest].sort(descending=True, stable=True).indices[: steps - done]]
    return order, gains


def _samples(free: torch.Tensor, panel: int, sample: int, generator: torch.Generator | None) -> torch.Tensor:
    """`(panel, sample)` random free columns, each row without repetition and never exhausted by the rows before it."""
    columns = free.nonzero()[:, 0]
    count = min(len(columns), max(sample, panel))
    noise = torch.rand(panel, len(columns), generator=generator)
    return columns[noise.topk(count, dim=1).indices.to(free.device)]


def _speculate(D, T, panel, floor, smallest, picks):
    """Up to `panel` greedy pivots within a pool, from `D` and `T = R R'` `(q, q)`.

    Returns their positions, gains, and the triangular factor of `D` on them.
    """
    q = len(D)
    rows, w_rows = D.new_zeros(panel, q), D.new_zeros(panel, q)
    d, norms = D.diagonal().clone(), T.diagonal().clone()
    worst = float("inf") if smallest else -1.0
    taken = torch.zeros(q, dtype=torch.bool, device=D.device)
    chosen, gains = [], D.new_zeros(panel)
    for step in range(panel):
        value = (norms / d).masked_fill_(taken | (d <= floor), worst)
        if picks is not None:
            candidates = picks[step]
            best = candidates[value[candidates].argmin() if smallest else value[candidates].argmax()]
        else:
            best = value.argmin() if smallest else value.argmax()
        p = int(best)
        if not smallest and value[p] <= 0:
            break
        root = d[p].sqrt()
        gains[step] = value[p]
        row, u = D[p].clone(), T[p].clone()
        if step:
            row_p, w_p = rows[:step, p], w_rows[:step, p]
            row -= row_p @ rows[:step]
            u -= row_p @ w_rows[:step]
            u -= w_p @ rows[:step]
        row /= root
        u /= root
        w = u - (0.5 * value[p]) * row  # ||v||^2 is the gain, so that T <- T - row w' - w row'
        rows[step], w_rows[step] = row, w
        d = d - row.square()
        norms = (norms - 2 * row * w).clamp_min_(0.0)
        taken[p] = True
        chosen.append(p)
    count = len(chosen)
    pivots = torch.tensor(chosen, dtype=torch.int64, device=D.device)
    return pivots, gains[:count], rows[:count, pivots].T.tril()


def _agreed(R, norms, diagonal, gain, rows, v, shrunk, pivots, chosen_gains, floor, tie, sign, free):
    """Number of leading pivots of a speculated panel that are the best of all columns at their step."""
    inner = v @ v.T
    projected = v @ R.T - inner.tril(-1) @ rows  # R.v as of each step
    lost = (2 * projected * rows - rows.square() * inner.diagonal()[:, None]).cumsum(0)
    d = diagonal - shrunk[:-1]
    value = (norms - lost[:-1]).clamp_min_(0.0) / d
    worst = float("inf") if sign < 0 else 0.0
    value.masked_fill_(~free | (d <= floor), worst)
    # A pivot is out of the race at all later steps.
    step = torch.arange(len(pivots), device=R.device)
    value[:, pivots] = torch.where(step[1:, None] > step, torch.full_like(value[:, pivots], worst), value[:, pivots])
    best = value.amin(1) if sign < 0 else value.amax(1)
    taken = chosen_gains[1:].to(best)
    beaten = (best < taken * (1 - tie)) if sign < 0 else (best > taken * (1 + tie))
    first = beaten.nonzero()
    return len(pivots) if len(first) == 0 else int(first[0]) + 1


def eliminate_groups(
    H: torch.Tensor,
    C: torch.Tensor,
    groups: torch.Tensor,
    steps: int,
    *,
    scale: torch.Tensor | None = None,
    smallest: bool = False,
    sample: int | None = None,
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`steps` pivots of groups of columns, whose gain is `tr(R_g' D_gg^-1 R_g)`, in float64.

    Only the diagonal blocks of `D` are kept; O(steps (n c (steps c + m + c))) operations.

    Args:
        groups: `(units, c)` int64, disjoint.
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
