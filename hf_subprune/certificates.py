"""How good a selection is, against the best that any selection of its size could be (ALGORITHM section 6).

All statements hold for the problem given: the objective `F(S) = tr(C_S' H_SS^-1 C_S)` of `H` and `C`, shrinkage and
metric included when they were added to them. Tensors only.
"""

from dataclasses import dataclass

import torch

from .selection import check_problem, columns_of


@dataclass(frozen=True)
class Certificate:
    """Bounds on a selection S of k units; S* is a best one of that size, V all units.

    Args:
        objective: `F(S)`.
        full: `F(V)`, an upper bound on `F(S*)`.
        ceiling: The least upper bound on `F(S*)` found.
        fraction: `objective / ceiling`: S keeps at least this part of what any choice of its size could keep.
        gamma: Lower bound on the submodularity ratio: the least eigenvalue of the correlation form of `H`.
        greedy_fraction: `1 - exp(-gamma)`, the part of `F(S*)` that greedy is sure to reach before it runs.
    """

    objective: float
    full: float
    ceiling: float
    fraction: float
    gamma: float
    greedy_fraction: float


def certify(
    H: torch.Tensor, C: torch.Tensor, kept: torch.Tensor, *, groups: torch.Tensor | None = None
) -> Certificate:
    """Bound what the best selection of the same size could reach. O(n^3 + n^2 m), in float64.

    `F(S*) <= F(S + S*) <= F(S) + sum(k largest gains given S) / lambda_min`, with `lambda_min` the least eigenvalue of
    the correlation form of the Schur complement D of `H_SS`: by interlacing, no `D_TT` has a smaller one.

    Args:
        H: `(n, n)` symmetric positive semi-definite.
        C: `(n, m)`.
        kept: `(k,)` int64, the selected units.
        groups: `(units, c)` int64, columns of each unit; single columns when `None`.

    Raises:
        ValueError: the tensors do not fit.
    """
    groups_ = check_problem(H, C, groups)
    H, C = H.double(), C.double()
    mask = torch.ones(len(groups_), dtype=torch.bool, device=H.device)
    mask[kept.to(H.device)] = False
    S, rest = columns_of(kept.to(H.device), groups_), groups_[mask]
    free = rest.reshape(-1)
    k = len(kept)
    factor, objective = _objective(H[S][:, S], C[S])
    L = torch.linalg.solve_triangular(factor, H[S][:, free], upper=False)
    v = torch.linalg.solve_triangular(factor, C[S], upper=False)
    D, R = H[free][:, free] - L.T @ L, C[free] - L.T @ v
    gains, least = _gains_and_least_eigenvalue(D, R, rest.shape[1])
    full = max(objective, _objective(*_all(H, C, groups_))[1])
    ceiling = full
    if least > 0:
        ceiling = min(full, objective + float(gains.sort(descending=True).values[:k].sum()) / least)
    everything = groups_.reshape(-1)
    _, gamma = _gains_and_least_eigenvalue(H[everything][:, everything], C[everything], groups_.shape[1])
    fraction = objective / ceiling if ceiling > 0 else 1.0
    return Certificate(objective, full, ceiling, min(fraction, 1.0), gamma, float(-torch.tensor(-gamma).expm1()))


def _all(H, C, groups):
    columns = groups.reshape(-1)
    return H[columns][:, columns], C[columns]


def _objective(H, C):
    """Cholesky factor of `H`, with a diagonal lifted by rounding errors if need be, and `tr(C' H^-1 C)`."""
    diagonal = H.diagonal()
    lift = torch.where(diagonal > 0, diagonal, 1.0)
    for jitter in (0.0, 1e-14, 1e-13, 1e-12, 1e-11, 1e-10):
        factor, info = torch.linalg.cholesky_ex(H + torch.diag(jitter * lift))
        if int(info) == 0:
            break
    else:
        raise ValueError("H is not positive semi-definite.")
    return factor, float(torch.linalg.solve_triangular(factor, C, upper=False).square().sum())


def _gains_and_least_eigenvalue(D, R, c):
    """Gains of groups of `c` consecutive columns, and the least eigenvalue of the block correlation form of `D`."""
    units = len(D) // c
    if units == 0:
        return D.new_zeros(0), 1.0
    blocks = D.view(units, c, units, c).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    factor, info = torch.linalg.cholesky_ex(blocks)
    if (info != 0).any():
        return D.new_zeros(0), 0.0
    whitened = torch.linalg.solve_triangular(factor, R.view(units, c, -1), upper=False)
    form = torch.linalg.solve_triangular(factor, D.view(units, c, -1), upper=False).reshape(len(D), -1)
    form = torch.linalg.solve_triangular(factor, form.T.reshape(units, c, -1), upper=False).reshape(len(D), -1)
    least = float(torch.linalg.eigvalsh(form)[0]) - 1e-12
    return whitened.square().sum((1, 2)), max(min(least, 1.0), 0.0)
