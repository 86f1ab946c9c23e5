"""How good a selection is, against the best that any selection of its size could be.

The paper (El Halabi et al. 2022) bounds what greedy reaches before it runs, by the submodularity ratio; here is also
what a selection is known to reach once it is there. All statements hold for the objective given,
`F(S) = tr(C_S' H_SS^-1 C_S)`, shrinkage and metric included when they were added to `H` and `C`. Tensors only.
"""

import math
from dataclasses import dataclass

import torch

from .factorisation import factorise
from .objective import Objective


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


def certify(objective: Objective, kept: torch.Tensor) -> Certificate:
    """Bound what the best selection of the same size could reach. O(n^3 + n^2 m), in float64.

    Where `H` is rank deficient the statements hold for `H` with rounding errors added to its scaled diagonal.

    `F(S*) <= F(S + S*) <= F(S) + sum(k largest gains given S) / lambda_min`, with `lambda_min` the least eigenvalue of
    the correlation form of the Schur complement D of `H_SS`: by interlacing, no `D_TT` has a smaller one.

    Args:
        objective: `F`.
        kept: `(k,)` int64, the selected units.

    Raises:
        RuntimeError: `H` is not positive semi-definite.
    """
    H, C, groups = objective.H, objective.C, objective.groups
    units, c = groups.shape
    mask = torch.zeros(units, dtype=torch.bool, device=H.device)
    mask[kept.to(H.device)] = True
    columns = torch.cat([groups[mask], groups[~mask]]).reshape(-1)  # kept ones first
    k, split = len(kept), len(kept) * c
    factor, scale, _ = factorise(H[columns[:, None], columns])
    v = torch.linalg.solve_triangular(factor, C[columns].double() * scale[:, None], upper=False)
    reached, full = float(v[:split].square().sum()), float(v.square().sum())
    # With the kept columns first, the trailing block of the factor is that of the Schur complement D, and R = L v.
    lower = factor[split:, split:]
    ceiling = min(full, reached + most_to_gain(lower @ lower.T, lower @ v[split:], k, c))
    gamma = least_eigenvalue(_block_correlation(factor @ factor.T, c))
    fraction = min(reached / ceiling, 1.0) if ceiling > 0 else 1.0
    return Certificate(reached, full, ceiling, fraction, gamma, -math.expm1(-gamma))


def most_to_gain(D: torch.Tensor, R: torch.Tensor, k: int, c: int = 1, *, rounding: float = 0.0) -> float:
    """What any `k` units more can add to an objective: their gains, over the least eigenvalue of a correlation form.

    `F(S + T) - F(S) = tr(R_T' D_TT^-1 R_T)`, and by interlacing no `D_TT` has a smaller least eigenvalue than `D`.

    Args:
        D: `(n, n)`, the Schur complement of `H_SS`; the `c` columns of a unit are neighbours.
        R: `(n, m)`, `C` less what S explains.
        k: Number of units.
        c: Columns a unit.
        rounding: How far eigenvalues of the correlation form may be off.

    Returns:
        The bound, at most what all columns of `D` together add; infinity where `D` is not known to be positive.
    """
    factor, info = torch.linalg.cholesky_ex(D)
    if int(info):
        return math.inf
    form = _block_correlation(D, c)
    least = least_eigenvalue(form) - rounding
    if least <= 0:
        return math.inf
    everything = float(torch.linalg.solve_triangular(factor, R, upper=False).square().sum(dtype=torch.float64))
    gains = torch.linalg.solve_triangular(_block_factors(D, c), R.view(len(D) // c, c, R.shape[1]), upper=False)
    best = float(gains.square().sum((1, 2), dtype=torch.float64).sort(descending=True).values[:k].sum())
    return min(best / least, everything * (1 + rounding / least))


def least_eigenvalue(A: torch.Tensor) -> float:
    """A lower bound, within a few percent, on the least eigenvalue of a symmetric positive definite `A` `(n, n)`.

    Inverse iteration estimates it from above; a Cholesky factorisation of `A - bound I` proves the bound, up to
    rounding. O(n^3 / 3) a factorisation, of which two or three are made. Returns 0.0 where none succeeds.
    """
    n = len(A)
    factor, info = torch.linalg.cholesky_ex(A)
    if int(info):
        return 0.0
    if n == 0:
        return 1.0
    X = torch.randn(n, min(n, 8), generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(A)
    bound = math.inf
    for _ in range(24):
        X = torch.linalg.qr(torch.cholesky_solve(X, factor)).Q
        last, bound = bound, float(torch.linalg.eigvalsh(X.T @ A @ X)[0])
        if bound > 0.99 * last:
            break
    for _ in range(40):
        bound *= 0.95
        shifted = A.clone()
        shifted.diagonal().sub_(bound)
        if int(torch.linalg.cholesky_ex(shifted).info) == 0:
            return bound
        bound *= 0.8
    return 0.0


def _block_factors(D: torch.Tensor, c: int) -> torch.Tensor:
    """`(units, c, c)` Cholesky factors of the diagonal blocks of `D`."""
    units = len(D) // c
    blocks = D.view(units, c, units, c).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    factors: torch.Tensor = torch.linalg.cholesky(blocks)
    return factors


def _block_correlation(D: torch.Tensor, c: int) -> torch.Tensor:
    """`D` with its groups of `c` columns whitened: identity blocks on the diagonal."""
    n, factors = len(D), _block_factors(D, c)
    half = torch.linalg.solve_triangular(factors, D.view(n // c, c, n), upper=False).reshape(n, n)
    form: torch.Tensor = torch.linalg.solve_triangular(factors, half.T.reshape(n // c, c, n), upper=False)
    return form.reshape(n, n)
