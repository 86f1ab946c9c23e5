"""Which units to keep: the greedy selection of arXiv 2203.04940 as a pivoted Cholesky factorisation.

Given second moments `H` `(n, n)` and `C` `(n, m)`, the objective of a set of columns S is
`F(S) = tr(C_S' H_SS^-1 C_S)`, the part of `||A W||_F^2` that new weights on S can explain. It grows with S. A unit is
one column or a group of columns. Tensors only; usable without a model.
"""

import math
from dataclasses import dataclass

import torch

from .certificates import most_to_gain
from .elimination import eliminate, eliminate_groups
from .factorisation import factorise, rounding, unit_scale
from .problem import check_problem, columns_of
from .reweighting import solve
from .swaps import refine

METHODS = ("auto", "greedy", "backward", "stochastic")

# Up to this many columns all of the computation is in float64; beyond, in float32 until that would not do.
_DOUBLE_BELOW = 1024
# Wider problems are left to greedy: matrices in float64 are twice as large.
_BACKWARD_UP_TO = 4096
# Added to a unit diagonal before it is inverted.
_LIFT = 1e-10


@dataclass(frozen=True, eq=False)
class Path:
    """Nested sets of units and their objective, from one run.

    Args:
        order: `(stop,)` int64; the first `k` entries are the set of size `k`, for `start <= k <= stop`.
        start: Smallest size for which the path is defined (0 for greedy, the last size reached by backward).
        objective: `(stop - start + 1,)` float64, `F` at the sizes `start ... stop`.
        method: `"greedy"`, `"backward"` or `"stochastic"`; `"nested"` for sets that were chosen elsewhere.
        t: `||A W||_F^2`, when it was given.
    """

    order: torch.Tensor
    start: int
    objective: torch.Tensor
    method: str
    t: float | None = None

    @property
    def gains(self) -> torch.Tensor:
        """`(stop - start,)` float64, what each further unit adds to the objective."""
        return self.objective.diff()

    @property
    def errors(self) -> torch.Tensor:
        """`(stop - start + 1,)` float64, the squared error `t - F` at the sizes `start ... stop`."""
        if self.t is None:
            raise ValueError("The error needs `t = ||A W||_F^2`, which was not given with the moments.")
        return (self.t - self.objective).clamp_min(0.0)

    def kept(self, k: int) -> torch.Tensor:
        """`(k,)` int64, the units of the set of size `k`, sorted."""
        if not self.start <= k <= len(self.order):
            raise ValueError(f"The path holds the sizes {self.start} to {len(self.order)}, not {k}.")
        return self.order[:k].sort().values

    def weights(self, H: torch.Tensor, C: torch.Tensor, k: int, groups: torch.Tensor | None = None) -> torch.Tensor:
        """`(k * c, m)`, the least squares weights `H_SS^-1 C_S` of the set of size `k`, in the order of `kept(k)`."""
        columns = columns_of(self.kept(k), groups).to(H.device)
        return solve(H[columns][:, columns], C[columns])[0]


def greedy(
    H: torch.Tensor,
    C: torch.Tensor,
    k: int,
    *,
    groups: torch.Tensor | None = None,
    sets: int = 1,
    t: float | None = None,
    epsilon: float | None = None,
    generator: torch.Generator | None = None,
) -> Path:
    """Add `k` units, each time the one that adds most to `F` (the paper's greedy, Algorithm 1).

    Args:
        H: `(n, n)` symmetric positive semi-definite.
        C: `(n, m)`.
        k: Number of units to choose.
        groups: `(units, c)` int64, the columns of each unit; single columns when `None`.
        sets: Units come in this many sets of equal size, one after the other, of each of which equally many are
            chosen: greedy over a partition matroid. The path then holds such a choice at size `k` only.
        t: `||A W||_F^2`, for the errors of the path.
        epsilon: When given, stochastic greedy: each step looks at `units / k * log(1 / epsilon)` random candidates.
        generator: Of the random candidates.

    Returns:
        The path of sizes 0 to `k`. Units that add nothing (dead, or dependent on those chosen) come last.

    Raises:
        ValueError: `k` or the tensors do not fit.
    """
    groups = _checked(H, C, groups, k, sets)
    units, c = groups.shape
    sample = None
    if epsilon is not None:
        if not 0 < epsilon < 1:
            raise ValueError(f"epsilon must lie between 0 and 1, got {epsilon}.")
        sample = min(units, math.ceil(units / max(k, 1) * math.log(1 / epsilon)))
    scale = unit_scale(H.diagonal())
    if c == 1 and sets == 1:
        H, C, scale = _rows(H, C, scale, groups)
        order, gains = eliminate(H, C, k, dtype=_working(H), scale=scale, sample=sample, generator=generator)
    else:
        order, gains = eliminate_groups(H, C, groups, k, scale=scale, sets=sets, sample=sample, generator=generator)
    objective = torch.cat([gains.new_zeros(1), gains.cumsum(0)])
    return Path(order, 0, objective, "greedy" if epsilon is None else "stochastic", t)


def backward(
    H: torch.Tensor,
    C: torch.Tensor,
    k: int,
    *,
    groups: torch.Tensor | None = None,
    sets: int = 1,
    t: float | None = None,
) -> Path:
    """Remove units from the full set, each time the one whose loss lowers `F` least, until `k` are left.

    The removal cost of a unit is `tr(V_g' P_gg^-1 V_g)` with `P = H_SS^-1` and `V = P C_S`; downdating `P` and
    `V` is the same recursion as that of greedy, so this is greedy on `(H^-1, H^-1 C)` with the smallest gain instead
    of the largest.

    Args and errors are those of `greedy`. Returns the path of sizes `k` to `units`.
    """
    groups = _checked(H, C, groups, k, sets)
    units, c = groups.shape
    H, C, _ = _rows(H, C, unit_scale(H.diagonal()), groups)
    # A dependent column has no finite inverse; the least jitter makes it one that costs next to nothing.
    factor, scale, _ = factorise(H, least=max(_LIFT, rounding(H)))
    C = C.double() * scale[:, None]
    full = float(torch.linalg.solve_triangular(factor, C, upper=False).square().sum())
    P, V = torch.cholesky_inverse(factor), torch.cholesky_solve(C, factor)
    del H, factor
    if c == 1 and sets == 1:
        removed, costs = eliminate(P, V, units - k, dtype=torch.float64, smallest=True)
    else:
        position = torch.arange(units * c, device=P.device).view(units, c)
        removed, costs = eliminate_groups(P, V, position, units - k, sets=sets, smallest=True)
    left = torch.ones(units, dtype=torch.bool, device=P.device)
    left[removed] = False
    order = torch.cat([left.nonzero()[:, 0], removed.flip(0)])
    objective = full - torch.cat([costs.new_zeros(1), costs.cumsum(0)])
    return Path(order, k, objective.flip(0), "backward", t)


def nested(H: torch.Tensor, C: torch.Tensor, order: torch.Tensor, groups: torch.Tensor, t: float) -> Path:
    """The path of sets that were chosen elsewhere: the beginnings of `order`, `(units,)` int64.

    Raises:
        RuntimeError: `H` is not positive semi-definite.
    """
    order, groups = order.to(H.device), groups.to(H.device)
    columns = groups[order].reshape(-1)
    factor, scale, _ = factorise(H[columns[:, None], columns])
    rows = torch.linalg.solve_triangular(factor, C[columns].double() * scale[:, None], upper=False)
    gains = rows.square().sum(1).view(len(order), -1).sum(1)
    return Path(order, 0, torch.cat([gains.new_zeros(1), gains.cumsum(0)]), "nested", t)


def objective(H: torch.Tensor, C: torch.Tensor, columns: torch.Tensor) -> float:
    """`F = tr(C_S' H_SS^-1 C_S)` of a set of columns, in float64, by Cholesky; dependent columns add nothing.

    Raises:
        RuntimeError: `H` is not positive semi-definite.
    """
    factor, scale, _ = factorise(H[columns[:, None], columns])
    return float(
        torch.linalg.solve_triangular(factor, C[columns].double() * scale[:, None], upper=False).square().sum()
    )


def _checked(H, C, groups, k, sets):
    """The groups of a problem that `k` units of `sets` sets can be chosen in."""
    groups = check_problem(H, C, groups)
    if not 0 <= k <= len(groups):
        raise ValueError(f"A selection can keep 0 to {len(groups)} units, not {k}.")
    if len(groups) % sets or k % sets:
        raise ValueError(f"{len(groups)} units and the {k} to keep must be multiples of the {sets} sets they are in.")
    return groups


def _working(H: torch.Tensor) -> torch.dtype:
    return torch.float64 if len(H) <= _DOUBLE_BELOW else torch.float32


def _rows(H, C, scale, groups):
    """The problem on the columns of the groups, in their order; as it is when these are all columns in order."""
    rows = groups.reshape(-1)
    if len(rows) == len(H) and bool((rows[1:] > rows[:-1]).all()):
        return H, C, scale
    return H[rows[:, None], rows], C[rows], scale[rows]


@dataclass(frozen=True, eq=False)
class Selection:
    """The units kept in one block.

    Args:
        kept: `(k,)` int64, sorted.
        objective: `F(kept)`.
        method: The method that ran: `"greedy"`, `"backward"` or `"stochastic"`.
        path: Nested sets that the choice started from.
        ceiling: What no choice of `k` units can exceed.
        swaps: Number of exchanges made by swap refinement.
        swap_gain: What they added to the objective.
    """

    kept: torch.Tensor
    objective: float
    method: str
    path: Path
    ceiling: float
    swaps: int = 0
    swap_gain: float = 0.0

    @property
    def guarantee(self) -> float:
        """Part of what any choice of as many units could reach that this one reaches at least."""
        return min(self.objective / self.ceiling, 1.0) if self.ceiling > 0 else 1.0


def select(
    H: torch.Tensor,
    C: torch.Tensor,
    k: int,
    *,
    groups: torch.Tensor | None = None,
    sets: int = 1,
    t: float | None = None,
    method: str = "auto",
    swaps: int | None = None,
    epsilon: float = 0.01,
    generator: torch.Generator | None = None,
) -> Selection:
    """Choose `k` units to keep.

    Args:
        H: `(n, n)`, with the shrinkage that reweighting will use already added.
        C: `(n, m)`, likewise; times `M^(1/2)` when errors are weighed by a metric `M`.
        k: Number of units to keep.
        groups: `(units, c)` int64, columns of each unit; single columns when `None`.
        sets: Units come in this many sets of equal size, one after the other, of each of which equally many are kept.
        t: `||A W||_F^2`, for the errors of the path.
        method: `"greedy"`, `"backward"`, `"stochastic"`, or `"auto"`: backward, whose matrices are in float64, when
            less than a third of at most 4096 columns goes.
        swaps: Largest number of exchanges in swap refinement; `None` goes on until none improves, 0 does none.
        epsilon: Of stochastic greedy.
        generator: Of stochastic greedy.

    Raises:
        ValueError: `k`, the method or the tensors do not fit.
    """
    if method not in METHODS:
        raise ValueError(f"Unknown method {method!r}: choose from {', '.join(METHODS)}.")
    groups_ = check_problem(H, C, groups)
    units = len(groups_)
    if method == "auto":
        few = units - k < units / 3 and groups_.numel() <= _BACKWARD_UP_TO
        method = "backward" if few else "greedy"
    if method == "backward":
        path = backward(H, C, k, groups=groups, sets=sets, t=t)
    else:
        sampled = epsilon if method == "stochastic" else None
        path = greedy(H, C, k, groups=groups, sets=sets, t=t, epsilon=sampled, generator=generator)
    kept = path.kept(k)
    reached = objective(H, C, columns_of(kept, groups))
    if not 0 < k < units:
        return Selection(kept, reached, method, path, reached)
    scale = unit_scale(H.diagonal())
    refined = refine(H, C, kept, groups=groups_, sets=sets, scale=scale, dtype=_working(H), budget=swaps)
    made, gain = refined.swaps, 0.0
    if made:
        gain = objective(H, C, columns_of(refined.kept, groups)) - reached
        if gain > 0:
            kept = refined.kept
        else:
            made, gain = 0, 0.0
    ceiling = reached + gain + most_to_gain(refined.D, refined.R, k, groups_.shape[1], rounding=refined.rounding)
    return Selection(kept, reached + gain, method, path, ceiling, made, gain)
