"""Which units to keep: greedy selection (El Halabi et al. 2022) as a pivoted Cholesky factorisation.

Forward selection, backward elimination and their refinement maximise `objective.Objective`. A unit is one column or a
group of columns. Tensors only; usable without a model.
"""

import math
from dataclasses import dataclass

import torch

from .certificates import most_to_gain
from .elimination import Draw, eliminate, eliminate_groups
from .factorisation import factorise, rounding, unit_scale
from .objective import Objective
from .settings import TUNING, Settings, Tuning
from .swaps import refine

METHODS = ("auto", "greedy", "backward", "stochastic")

# Wider problems are left to greedy, which needs no inverse beside the moments.
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
    """

    order: torch.Tensor
    start: int
    objective: torch.Tensor
    method: str

    def kept(self, k: int) -> torch.Tensor:
        """`(k,)` int64, the units of the set of size `k`, sorted."""
        if not self.start <= k <= len(self.order):
            raise ValueError(f"The path holds the sizes {self.start} to {len(self.order)}, not {k}.")
        return self.order[:k].sort().values


def greedy(
    objective: Objective,
    k: int,
    *,
    epsilon: float | None = None,
    generator: torch.Generator | None = None,
    tuning: Tuning = TUNING,
) -> Path:
    """Add `k` units, each time the one that adds most to `F` (the paper's greedy, Algorithm 1).

    Given S, with the Schur complement `D = H - H_:S H_SS^-1 H_S:` and `R = C - H_:S H_SS^-1 C_S`, a unit g adds
    `F(S + g) - F(S) = tr(R_g' D_gg^-1 R_g)`: of one column, `||R_j||^2 / D_jj`.

    Args:
        objective: `F`. Where its units are in several sets, the path holds equally many of each at size `k` only.
        k: Number of units to choose.
        epsilon: When given, stochastic greedy: each step looks at `units / k * log(1 / epsilon)` random candidates.
        generator: Of the random candidates.
        tuning: Of the elimination.

    Returns:
        The path of sizes 0 to `k`. Units that add nothing (dead, or dependent on those chosen) come last.

    Raises:
        ValueError: `k` does not fit.
    """
    objective.check(k)
    units, c = objective.groups.shape
    draw = None
    if epsilon is not None:
        if not 0 < epsilon < 1:
            raise ValueError(f"epsilon must lie between 0 and 1, got {epsilon}.")
        draw = Draw(min(units, math.ceil(units / max(k, 1) * math.log(1 / epsilon))), generator)
    scale = unit_scale(objective.H.diagonal())
    if c == 1 and objective.sets == 1:
        H, C, scale = _rows(objective, scale)
        order, gains = eliminate(H, C, k, dtype=tuning.dtype(len(H)), scale=scale, draw=draw, tuning=tuning)
    else:
        H, C, groups = objective.H, objective.C, objective.groups
        order, gains = eliminate_groups(H, C, groups, k, scale=scale, sets=objective.sets, draw=draw)
    return Path(order, 0, _running(gains), "greedy" if epsilon is None else "stochastic")


def backward(objective: Objective, k: int, *, tuning: Tuning = TUNING) -> Path:
    """Remove units from the full set, each time the one whose loss lowers `F` least, until `k` are left.

    The removal cost of a unit is `tr(V_g' P_gg^-1 V_g)` with `P = H_SS^-1` and `V = P C_S`; downdating `P` and
    `V` is the same recursion as that of greedy, so this is greedy on `(H^-1, H^-1 C)` with the smallest gain instead
    of the largest.

    Args and errors are those of `greedy`. Returns the path of sizes `k` to `units`.
    """
    objective.check(k)
    units, c = objective.groups.shape
    H, C, _ = _rows(objective, unit_scale(objective.H.diagonal()))
    dtype = tuning.dtype(len(H))
    # A dependent column has no finite inverse; the least jitter makes it one that costs next to nothing.
    factor, scale, _ = factorise(H, least=max(_LIFT, rounding(H, dtype)), dtype=dtype)
    C = C.to(dtype) * scale[:, None]
    P = torch.cholesky_inverse(factor)
    V = P @ C
    full = float((C * V).sum(dtype=torch.float64))
    del H, factor
    if c == 1 and objective.sets == 1:
        removed, costs = eliminate(P, V, units - k, dtype=dtype, smallest=True, tuning=tuning)
    else:
        position = torch.arange(units * c, device=P.device).view(units, c)
        removed, costs = eliminate_groups(P, V, position, units - k, sets=objective.sets, smallest=True)
    left = torch.ones(units, dtype=torch.bool, device=P.device)
    left[removed] = False
    order = torch.cat([left.nonzero()[:, 0], removed.flip(0)])
    return Path(order, k, (full - _running(costs)).flip(0), "backward")


def nested(objective: Objective, order: torch.Tensor) -> Path:
    """The path of sets that were chosen elsewhere: the beginnings of `order`, `(units,)` int64.

    Raises:
        RuntimeError: `H` is not positive semi-definite.
    """
    order = order.to(objective.H.device)
    columns = objective.groups[order].reshape(-1)
    factor, scale, _ = factorise(objective.H[columns[:, None], columns])
    scaled = objective.C[columns].double() * scale[:, None]
    rows = torch.linalg.solve_triangular(factor, scaled, upper=False)
    return Path(order, 0, _running(rows.square().sum(1).view(len(order), -1).sum(1)), "nested")


def _running(gains: torch.Tensor) -> torch.Tensor:
    """`(steps + 1,)`: the sums of no, the first, the first two gains and so on."""
    return torch.cat([gains.new_zeros(1), gains.cumsum(0)])


def _rows(objective: Objective, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`H`, `C` and scale on the columns of the units, in their order; as they are when these are all, in order."""
    H, C, rows = objective.H, objective.C, objective.groups.reshape(-1)
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


def select(objective: Objective, k: int, settings: Settings) -> Selection:
    """Choose `k` units to keep: a path of nested sets, whose set of size `k` is refined by exchanges.

    Args:
        objective: `F`.
        k: Number of units to keep.
        settings: `method`, `swaps`, `seed` and `tuning` are read. Method `"auto"` is backward when less than a
            third of at most 4096 columns goes.

    Raises:
        ValueError: `k` or the method does not fit.
    """
    method, tuning = settings.method, settings.tuning
    if method not in METHODS:
        raise ValueError(f"Unknown method {method!r}: choose from {', '.join(METHODS)}.")
    units, c = objective.groups.shape
    if method == "auto":
        few = units - k < units / 3 and objective.groups.numel() <= _BACKWARD_UP_TO
        method = "backward" if few else "greedy"
    if method == "backward":
        path = backward(objective, k, tuning=tuning)
    else:
        epsilon = tuning.epsilon if method == "stochastic" else None
        path = greedy(objective, k, epsilon=epsilon, generator=settings.generator(), tuning=tuning)
    kept = path.kept(k)
    reached = float(path.objective[0]) if method == "backward" else objective.value(kept)
    if not 0 < k < units:
        return Selection(kept, reached, method, path, reached)
    refined = refine(objective, kept, dtype=tuning.dtype(len(objective.H)), budget=settings.swaps)
    made, gain = refined.swaps, 0.0
    if made:
        gain = objective.value(refined.kept) - reached
        if gain > 0:
            kept = refined.kept
        else:
            made, gain = 0, 0.0
    ceiling = reached + gain + most_to_gain(refined.D, refined.R, k, c, rounding=refined.rounding)
    return Selection(kept, reached + gain, method, path, ceiling, made, gain)
