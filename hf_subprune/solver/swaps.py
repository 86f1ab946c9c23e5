"""Swap refinement: exchange kept and removed units while the objective grows.

Of single columns, those that would be missed most if all were there are added first, and as many of the cheapest are
removed: columns that add much only together, which no forward step sees. Then they oscillate (Somol and Pudil, 2000):
dozens of the best are added and as many of the cheapest are removed, or the other way round, which leaves local optima
that no single exchange can. Exchanges of pairs follow.

All that exchanges need is in one symmetric tableau. With S the kept columns, U the others, `P = H_SS^-1`,
`Z = P H_SU`, and the Schur complement `D = H_UU - H_US Z`,

    G = [[-P, Z], [Z', D]]        X = [[V = P C_S], [R = C_U - H_US V]]

Moving columns E between S and U is a principal pivot: `G <- G - G_:E G_EE^-1 G_E:` off E. The gain of adding j is
`||X_j||^2 / D_jj`, and the cost of removing i is `||X_i||^2 / P_ii`.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

from .factorisation import add_symmetric, rounding, unit_scale
from .objective import Objective

# Columns on either side of the pool within which exchanges are made before the whole tableau follows.
_POOL = 64
# Columns added before as many are removed.
_DEPTH = 32
# Exchanges that add less than this part of the objective are left alone, by dtype of the tableau.
_LEAST_GAIN = {torch.float64: 1e-9, torch.float32: 1e-7}
# Multiple of the rounding error of eigenvalues that is added to the unit diagonal.
_LIFT = 16.0
# Numbers in one piece of the table of all exchanges.
_CHUNK = 1 << 22


@dataclass(frozen=True, eq=False)
class Refined:
    """A set that no single exchange improves, unless the budget ended first, and what it leaves of the problem.

    Args:
        kept: `(k,)` int64, sorted.
        swaps: Number of exchanges made.
        D: `(u, u)`, Schur complement on the columns of the units left out, unit by unit; scaled by `scale`.
        R: `(u, m)`, what the set leaves of `C` there, likewise.
        rounding: How far eigenvalues of `D` may be off.
    """

    kept: torch.Tensor
    swaps: int
    D: torch.Tensor
    R: torch.Tensor
    rounding: float


def refine(objective: Objective, kept: torch.Tensor, *, dtype: torch.dtype, budget: int | None = None) -> Refined:
    """Exchange units until no single exchange adds to the objective, or the budget is spent.

    Args:
        objective: `F`. Only units of one set change places.
        kept: `(k,)` int64 units, the starting set.
        dtype: Of the tableau, `(n, n)`.
        budget: Largest number of exchanges; `None` for no limit.

    O(n^2 (n + m)) for the tableau and for each round of up to 64 exchanges, the last ones of which look at all pairs.
    """
    tableau = _Tableau(objective, kept, dtype)
    limit = len(kept) * 10 if budget is None else budget
    single = tableau.c == 1 and objective.sets == 1
    made = tableau.recall(limit) if single and limit else 0  # once: a second time has nearly nothing to add
    for exchange in (tableau.oscillate, tableau.exchange_columns) if single else (tableau.exchange_group,):
        while made < limit and (count := exchange(limit - made)):
            made += count
    outside = tableau.columns((~tableau.inside).nonzero()[:, 0])
    D, R = tableau.G[outside[:, None], outside], tableau.X[outside]
    return Refined(tableau.order[tableau.inside].sort().values, made, D, R, tableau.lift)


class _Tableau:
    """`G` and `X` of the module's docstring, the units of `order` one after the other; which of them are inside S.

    `order` begins with the kept units. Units are known by their position in it.
    """

    def __init__(self, objective: Objective, kept: torch.Tensor, dtype: torch.dtype):
        H, C, groups = objective.H, objective.C, objective.groups
        scale = unit_scale(H.diagonal()).to(dtype)
        self.c, k = groups.shape[1], len(kept)
        self.inside = torch.arange(len(groups), device=H.device) < k
        self.order = torch.cat([kept, self.inside.new_ones(len(groups)).index_fill(0, kept, False).nonzero()[:, 0]])
        self.set_of = self.order.div(len(groups) // objective.sets, rounding_mode="floor")
        rows, s = groups[self.order].reshape(-1), k * self.c
        G = H[rows[:, None], rows].to(dtype).mul_(scale[rows, None]).mul_(scale[rows])
        X = C[rows].to(dtype).mul_(scale[rows, None])
        # Dead and duplicate columns have no finite inverse: lift the unit diagonal by rounding errors.
        self.lift = _LIFT * rounding(H, dtype)
        G.diagonal().add_(self.lift)
        factor, info = torch.linalg.cholesky_ex(G[:s, :s])
        while int(info) and self.lift < 1:
            G.diagonal().add_(9 * self.lift)
            self.lift *= 10
            factor, info = torch.linalg.cholesky_ex(G[:s, :s])
        half, x = (torch.linalg.solve_triangular(factor, part, upper=False) for part in (G[:s, s:], X[:s]))
        add_symmetric(G[s:, s:], half, half, alpha=-1)
        X[s:].addmm_(half.T, x, alpha=-1)
        self.objective = float(x.square().sum(dtype=torch.float64))
        torch.linalg.solve_triangular(factor.T, half, upper=True, out=half)
        G[:s, s:], G[s:, :s] = half, half.T
        del half
        G[:s, :s] = torch.cholesky_inverse(factor).neg_()
        X[:s] = torch.linalg.solve_triangular(factor.T, x, upper=True)
        self.G, self.X, self.least = G, X, _LEAST_GAIN[dtype]

    def columns(self, units: torch.Tensor) -> torch.Tensor:
        """Rows of `G` of some units."""
        return (units[:, None] * self.c + torch.arange(self.c, device=units.device)).reshape(-1)

    def move(self, units: torch.Tensor, add: bool) -> None:
        """Pivot units into S or out of it."""
        E = self.columns(units)
        sign = 1.0 if add else -1.0
        rows, x = self.G[E], self.X[E]
        factor = torch.linalg.cholesky(sign * rows[:, E])
        solved = sign * torch.cholesky_solve(rows, factor)
        x_solved = sign * torch.cholesky_solve(x, factor)
        self.G.addmm_(rows.T, solved, alpha=-1)
        self.X.addmm_(rows.T, x_solved, alpha=-1)
        self.G[E], self.G[:, E] = sign * solved, sign * solved.T
        self.G[E[:, None], E] = -sign * torch.cholesky_inverse(factor)
        self.X[E] = sign * x_solved
        self.inside[units] = add

    def recall(self, limit: int) -> int:
        """Additions of what would be missed most if all were there, then as many removals. Returns the exchanges."""
        S, U = self.inside.nonzero()[:, 0], (~self.inside).nonzero()[:, 0]
        factor, info = torch.linalg.cholesky_ex(self.G[U[:, None], U])
        if int(info):
            return 0
        missed = torch.cholesky_solve(self.X[U], factor).square().sum(1) / torch.cholesky_inverse(factor).diagonal()
        depth = min(_DEPTH, limit, len(S), len(U))
        return self._there_and_back(self._cheapest(S), U[missed.topk(depth).indices], depth, add_first=True)

    def oscillate(self, limit: int) -> int:
        """Additions and as many removals, within a pool of the best, then removals first. Returns the exchanges."""
        made = 0
        for add_first in (True, False):
            S, U = self.inside.nonzero()[:, 0], (~self.inside).nonzero()[:, 0]
            best = U[self._values(U).topk(min(_POOL, len(U))).indices]
            depth = min(_DEPTH, limit - made, len(S), len(U))
            made += self._there_and_back(self._cheapest(S), best, depth, add_first)
        return made

    def _values(self, units: torch.Tensor) -> torch.Tensor:
        """The gain of adding each, or the cost of removing it."""
        norms: torch.Tensor = torch.linalg.vector_norm(self.X[units], dim=1).square()
        return norms / self.G.diagonal()[units].abs()

    def _cheapest(self, S: torch.Tensor) -> torch.Tensor:
        return S[self._values(S).topk(min(_POOL, len(S)), largest=False).indices]

    def _there_and_back(self, cheap: torch.Tensor, best: torch.Tensor, depth: int, add_first: bool) -> int:
        """`depth` additions and as many removals within two pools, if they improve. Returns the exchanges."""
        pool = torch.cat([cheap, best])
        G, T, inside = self._within(pool)
        inside, gained = _oscillated(G, T, inside, depth, add_first, self.lift)
        return self._follow(pool, inside, gained) if gained > self.least * self.objective else 0

    def _within(self, pool: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`G` and `X X'` on some columns, in float64, and which of them are inside S."""
        X = self.X[pool]
        return self.G[pool[:, None], pool].double(), (X @ X.T).double(), self.inside[pool].clone()

    def _follow(self, pool: torch.Tensor, inside: torch.Tensor, gained: float) -> int:
        """Move the columns of a pool to where they were found to belong. Returns the number of exchanges."""
        before = self.inside[pool]
        added = pool[inside & ~before]
        if len(added):
            self.move(added, add=True)
            self.move(pool[before & ~inside], add=False)
        self.objective += gained
        return len(added)

    def exchange_columns(self, limit: int) -> int:
        """One round for single columns: exchanges within a pool of the most promising pairs. Returns their number."""
        S, U = self.inside.nonzero()[:, 0], (~self.inside).nonzero()[:, 0]
        if len(S) == 0 or len(U) == 0:
            return 0
        partner, delta = self._best_partners(S, U)
        top = delta.topk(min(_POOL, len(U)))
        if float(top.values[0]) <= self.least * self.objective:
            return 0
        pool = torch.cat([S[partner[top.indices]].unique(), U[top.indices]])
        G, T, inside = self._within(pool)
        made, gained = 0, 0.0
        while made < limit:
            inner, outer = inside.nonzero()[:, 0], (~inside).nonzero()[:, 0]
            value = _exchange_values(
                G[inner[:, None], outer], T[inner[:, None], outer], *_diagonals(G, T, inner), *_diagonals(G, T, outer)
            )
            best = int(value.argmax())
            gain = float(value.view(-1)[best])
            if gain <= self.least * self.objective:
                break
            i, j = int(inner[best // len(outer)]), int(outer[best % len(outer)])
            _pivot(G, T, j, 1.0)
            _pivot(G, T, i, -1.0)
            inside[j], inside[i] = True, False
            gained += gain
            made += 1
        self._follow(pool, inside, gained)
        return made

    def _best_partners(self, S: torch.Tensor, U: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """For each column of U, the position in S of the best one to give up for it, and what the exchange adds."""
        norms = torch.linalg.vector_norm(self.X, dim=1).square()
        diagonal = self.G.diagonal()
        partners, deltas = [], []
        for part in U.split(max(1, _CHUNK // len(S))):
            value = _exchange_values(
                self.G[S[:, None], part],
                self.X[S] @ self.X[part].T,
                norms[S],
                -diagonal[S],
                norms[part],
                diagonal[part],
            )
            delta, partner = value.max(0)
            partners.append(partner)
            deltas.append(delta)
        return torch.cat(partners), torch.cat(deltas)

    def exchange_group(self, limit: int) -> int:
        """The best single exchange of groups, if one improves. Returns 1 or 0."""
        S, U = self.inside.nonzero()[:, 0], (~self.inside).nonzero()[:, 0]
        c, best = self.c, (self.least * self.objective, -1, -1)
        columns = self.columns(S).view(-1, c)
        P = -self.G[columns[:, :, None], columns[:, None, :]]
        for j in U.tolist():
            J = torch.arange(j * c, (j + 1) * c, device=S.device)
            factor, info = torch.linalg.cholesky_ex(self.G[J[:, None], J])
            if int(info) or not len(S):
                continue
            x = torch.linalg.solve_triangular(factor, self.X[J], upper=False)
            z = torch.linalg.solve_triangular(factor, self.G[J][:, self.columns(S)], upper=False)
            z = z.T.reshape(-1, c, c)
            with_j, info = torch.linalg.cholesky_ex(P + z @ z.transpose(1, 2))
            cost = torch.linalg.solve_triangular(with_j, self.X[columns] - z @ x, upper=False).square().sum((1, 2))
            cost = torch.where((info == 0) & (self.set_of[S] == self.set_of[j]), cost, float("inf"))
            delta = x.square().sum() - cost
            if float(delta.max()) > best[0]:
                best = float(delta.max()), int(S[delta.argmax()]), j
        gain, i, j = best
        if j < 0:
            return 0
        self.move(torch.tensor([j], device=S.device), add=True)
        self.move(torch.tensor([i], device=S.device), add=False)
        self.objective += gain
        return 1


def _oscillated(
    G_pool: torch.Tensor, T_pool: torch.Tensor, inside_pool: torch.Tensor, depth: int, add_first: bool, lift: float
) -> tuple[torch.Tensor, float]:
    """`depth` best additions and as many cheapest removals, or the other way round, within a pool, from `G` and
    `T = X X'` `(q, q)`. Returns which columns are inside then, and what that adds to the objective.

    A pivot at j is `G - u u' / d` but for the corner, with `d = G_jj` and `u` the column j but for its own entry, so
    only the columns of pivots are ever made. In NumPy and on the CPU, as a chain of operations on a few numbers each.
    """
    G, T, inside = (x.cpu().numpy() for x in (G_pool, T_pool, inside_pool))
    columns, shares, losses = np.zeros((3, 2 * depth, len(G)))  # u, u / d, and w with T <- T - u w' - w u'
    diagonal, norms = G.diagonal().copy(), T.diagonal().copy()
    gained = 0.0
    for step in range(2 * depth):
        add = add_first == (step < depth)
        sign = 1.0 if add else -1.0
        value = norms / np.maximum(np.abs(diagonal), lift)
        value[inside == add] = -sign * np.inf
        j = int(value.argmax() if add else value.argmin())
        gained += sign * float(value[j])
        d, done = diagonal[j], columns[:step]
        if abs(d) < lift:  # of dependent columns: noise
            gained = -math.inf
            break
        u = G[j] - shares[:step, j] @ done
        t = T[j] - losses[:step, j] @ done - done[:, j] @ losses[:step]
        u[j] = d - sign
        w = t / d - u * (t[j] / (2 * d * d))
        columns[step], shares[step], losses[step] = u, u / d, w
        diagonal -= u * shares[step]
        diagonal[j] -= 2 * sign
        norms -= 2 * u * w
        inside[j] = add
    return torch.from_numpy(inside).to(G_pool.device), gained


def _diagonals(G: torch.Tensor, T: torch.Tensor, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return T.diagonal()[index], G.diagonal()[index].abs()


def _exchange_values(
    z: torch.Tensor,
    cross: torch.Tensor,
    inner_norm: torch.Tensor,
    P: torch.Tensor,
    outer_norm: torch.Tensor,
    D: torch.Tensor,
) -> torch.Tensor:
    """What adding j (columns) and then removing i (rows) adds to the objective, for all pairs.

    `gain_j - ||V_i - z_ij R_j / D_j||^2 / (P_i + z_ij^2 / D_j)`.
    """
    ratio = z / D
    cost = inner_norm[:, None] - ratio * (2 * cross - ratio * outer_norm)
    return outer_norm / D - cost.clamp_min_(0.0) / (P[:, None] + ratio * z)


def _pivot(G: torch.Tensor, T: torch.Tensor, j: int, sign: float) -> None:
    """Move column j of a pool into S (sign 1) or out of it (-1); `T = X X'` follows."""
    d = G[j, j].clone()
    g, t = G[j] / d, T[j].clone()
    row = G[j].clone()
    T_jj = t[j].clone()
    G.addr_(row, g, alpha=-1)
    T.addr_(g, t, alpha=-1).addr_(t - g * T_jj, g, alpha=-1)
    G[j] = G[:, j] = sign * g
    G[j, j] = -1 / d
    new = sign * (t - g * T_jj) / d
    T[j] = T[:, j] = new
    T[j, j] = T_jj / d.square()
