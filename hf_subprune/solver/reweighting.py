"""New weights for the units that stay: least squares with shrinkage to the original weights.

The reweighting of El Halabi et al. 2022, `V = argmin ||A W - B_S V||_F^2 = H_SS^-1 C_S`, with a ridge towards the
original weights: from few rows, plain least squares overfits. In moments `H = B'B` `(n, n)` and `C = B'A W` `(n, m)`,

    V = argmin ||A W - B_S V||_F^2 + l ||V - W_S||_F^2 = (H_SS + l I)^-1 (C_S + l W_S),    l = lambda mean(diag H)

with lambda cross-fitted. Where targets come from another model, `C = H W + (C - H W)`: the one part makes up for the
columns that go, the other mends what was done before this block. That is mostly noise, which block after block would
be fitted to the same rows, so how much of it counts is cross-fitted, too; where none does, the target is `B W`. An
intercept makes moments centred, and `mean(A) W - mean(B_S) V` go into the bias. Weights are `(inputs, outputs)`.
Tensors only.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from .factorisation import factorise
from .moments import Moments, Rows, combine, restrict

# Multiples of mean(diag H) tried by cross-fitting. At infinity the weights stay as they are.
SHRINKAGE_GRID = (1e-4, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 10.0, math.inf)
_FIRST_TRIED = (1e-1, 3e-1)
# Up to this many kept columns cross-fitting is in float64.
_DOUBLE_BELOW = 256
# Beyond this many outputs, cross-fitting looks at as many random combinations of them.
_MOST_OUTPUTS = 128
# `C - H W` below this part of `H W`, in squares, is rounding: the target is the input times the weight.
_NOTHING = 1e-8


def solve_normal_equations(
    H: torch.Tensor, C: torch.Tensor, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, float]:
    """`H^-1 C` by Cholesky, with as little added to the diagonal as makes it succeed.

    Args:
        H: `(k, k)` symmetric positive semi-definite.
        C: `(k, m)`.
        dtype: Of the computation.

    Returns:
        The `(k, m)` solution, in the dtype of `H`, and the jitter: the multiple of the diagonal that had to be added
        (0.0 when none). Dead columns get weight zero.

    Raises:
        RuntimeError: `H` is not positive semi-definite up to rounding, or an entry is not finite.
    """
    if not torch.isfinite(C).all():
        raise RuntimeError("The moments are not finite: check the calibration activations.")
    factor, scale, jitter = factorise(H, dtype=dtype)
    return (torch.cholesky_solve(C.to(dtype) * scale[:, None], factor) * scale[:, None]).to(H), jitter


@dataclass(frozen=True, eq=False)
class Reweighted:
    """New weights of the consumer on the kept columns.

    Args:
        V: `(k, m)`, inputs by outputs.
        bias_shift: `(m,)`, to be added to the consumer's bias; zeros without an intercept.
        jitter: Relative amount added to the diagonal for the factorisation to succeed.
    """

    V: torch.Tensor
    bias_shift: torch.Tensor
    jitter: float


def reweight(
    moments: Moments, W: torch.Tensor, columns: torch.Tensor, shrinkage: float, mending: float = 1.0
) -> Reweighted:
    """Least squares weights on the kept columns, pulled towards the original ones.

    `V = (H_SS + l I)^-1 (C_S + l W_S)` with `l = shrinkage * mean(diag H)`.

    Args:
        moments: Of the consumer's input and target.
        W: `(n, m)`, the original weight.
        columns: `(k,)` int64, the kept columns, sorted.
        shrinkage: lambda >= 0; infinity keeps the original weights.
        mending: Part of `C - H W` that counts.

    Raises:
        RuntimeError: the moments are not positive semi-definite.
    """
    kept, W = restrict(moments, columns), W.to(moments.H)
    if mending != 1:
        kept = replace(kept, C=torch.lerp(moments.H[columns] @ W, kept.C, mending))
    return _reweight(kept, W[columns], shrinkage, float(moments.H.diagonal().mean()))


def _reweight(kept: Moments, W: torch.Tensor, shrinkage: float, energy: float) -> Reweighted:
    """`reweight` for moments and weights of the kept columns; `energy` is the mean over all columns of `diag H`."""
    V, jitter = W, 0.0
    if not math.isinf(shrinkage):
        ridge = shrinkage * energy
        H = kept.H.clone()
        H.diagonal().add_(ridge)
        V, jitter = solve_normal_equations(H, kept.C + ridge * W)
    shift = torch.zeros_like(kept.target_mean)
    if kept.intercept:
        shift = kept.target_mean - kept.input_mean @ V.to(kept.input_mean)
    return Reweighted(V, shift, jitter)


def relative_error(moments: Moments, columns: torch.Tensor, V: torch.Tensor, shift: torch.Tensor) -> float:
    """`||Y - B_S V - shift||_F^2 / ||Y||_F^2` on the rows of the moments, from the moments alone.

    With an intercept `Y` in the denominator is centred, and the numerator includes the difference of the means that
    a bias fitted on other rows leaves.

    Args:
        moments: Of any rows, of the same consumer.
        columns: `(k,)` int64, kept columns.
        V: `(k, m)`.
        shift: `(m,)`, the change of the bias.
    """
    return _relative_error(restrict(moments, columns), V, shift)


def relative_error_of_rows(
    rows: Sequence[Rows],
    mean: torch.Tensor | None,
    W: torch.Tensor,
    columns: torch.Tensor,
    V: torch.Tensor,
    shift: torch.Tensor,
) -> float:
    """`relative_error` from the rows themselves: where they are few, that takes less than their moments do.

    Args:
        rows: In float32; their targets are the inputs times `W` where they have none.
        mean: `(n,)`, what was subtracted from the inputs; `None` without an intercept.
        W: `(n, m)`, the original weight.
        columns: `(k,)` int64, kept columns.
        V: `(k, m)`.
        shift: `(m,)`, the change of the bias.
    """
    inputs, targets = rows[0].inputs, rows[0].targets
    W, V, offset, columns = W.to(inputs), V.to(inputs), -shift.to(inputs), columns.to(inputs.device)
    if mean is not None:
        offset = offset - mean.to(inputs)[columns] @ V + (mean.to(inputs) @ W if targets is None else 0)
    left, square, weight = torch.zeros(3, dtype=torch.float64, device=inputs.device)
    total = torch.zeros_like(offset, dtype=torch.float64)
    for some in rows:
        x, w = some.inputs, some.weights
        target = x @ W if some.targets is None else some.targets.to(x)
        left += w @ (target - x[:, columns] @ V + offset).square().sum(1)
        square += w @ target.square().sum(1)
        total += w @ target
        weight += w.sum(dtype=torch.float64)
    if mean is not None:
        square -= total.square().sum() / weight
    return float(left / square) if square > 0 else 0.0


def _relative_error(kept: Moments, V: torch.Tensor, shift: torch.Tensor) -> float:
    """`relative_error` for moments of the kept columns."""
    return max(kept.t + _left(kept, V, shift), 0.0) / kept.t if kept.t > 0 else 0.0


def _left(kept: Moments, V: torch.Tensor, shift: torch.Tensor) -> float:
    """The squared error that weights on the kept columns leave, less that of keeping nothing."""
    V = V.to(kept.H)
    change = float((V * (kept.H @ V - 2 * kept.C)).sum(dtype=torch.float64))
    if kept.intercept:
        mismatch = kept.target_mean - kept.input_mean @ V - shift.to(V)
        change += kept.rows * float(mismatch.square().sum(dtype=torch.float64))
    return change


@dataclass(frozen=True)
class CrossFit:
    """Result of cross-fitting.

    Args:
        shrinkage: The lambda to fit all rows with.
        mending: Part of `C - H W` that is to count; 1 where that is nothing.
        excess: Relative error on the rows left out, at each lambda of the grid that was tried, above the least one.
        grid: These lambdas, ascending.
    """

    shrinkage: float
    mending: float
    excess: tuple[float, ...]
    grid: tuple[float, ...]


def cross_fit(folds: Sequence[Moments], W: torch.Tensor, columns: torch.Tensor) -> CrossFit:
    """Choose shrinkage and mending that do best on rows not fitted on, from the folds' moments alone.

    The values of `_FIRST_TRIED` are tried, then the neighbours of the best until none is better: the error falls and
    then rises with lambda. Wide problems in float32, and with random combinations in place of very many outputs, since
    errors are compared to three digits at most.

    Args:
        folds: Moments of two or more disjoint parts of the calibration rows.
        W: `(n, m)`, the original weight.
        columns: `(k,)` int64, the kept columns.

    Raises:
        ValueError: fewer than two folds.
    """
    if len(folds) < 2:
        raise ValueError(f"Cross-fitting takes two or more folds, got {len(folds)}.")
    dtype = torch.float32 if len(columns) > _DOUBLE_BELOW else torch.float64
    W = W.to(device=folds[0].H.device, dtype=dtype)
    kept = [restrict(fold, columns, dtype) for fold in folds]
    if W.shape[1] > _MOST_OUTPUTS:
        signs = torch.randint(2, (W.shape[1], _MOST_OUTPUTS), generator=torch.Generator().manual_seed(0))
        mix = ((2 * signs - 1) / math.sqrt(_MOST_OUTPUTS)).to(W)  # keeps squared errors, in expectation
        kept = [replace(part, C=part.C @ mix, target_mean=part.target_mean @ mix) for part in kept]
        W = W @ mix
    parts = [_LeftOut(folds, kept, index, W, columns) for index in range(len(folds))]
    found: dict[float, tuple[float, float]] = {}

    def try_out(values: Sequence[float]) -> None:
        found.update((value, _least(torch.stack([part.left(value) for part in parts]).sum(0))) for value in values)

    try_out(_FIRST_TRIED)
    while True:
        best = min(found, key=found.__getitem__)
        place = SHRINKAGE_GRID.index(best)
        untried = [value for value in SHRINKAGE_GRID[max(place - 1, 0) : place + 2] if value not in found]
        if not untried:
            break
        try_out(untried)
    tried = tuple(sorted(found))
    (least, mending), total = found[best], sum(fold.t for fold in folds)
    excess = tuple((found[value][0] - least) / total if total > 0 else 0.0 for value in tried)
    return CrossFit(_refined(tried, excess, len(folds)), mending, excess, tried)


def _least(parabola: torch.Tensor) -> tuple[float, float]:
    """The least value of `a + b x + c x^2` `(3,)` for x from 0 to 1, and that x; 1 where x makes no difference."""
    a, b, c = parabola.tolist()
    x = min(max(-b / (2 * c), 0.0), 1.0) if c > 0 else 1.0
    return a + b * x + c * x * x, x


class _LeftOut:
    """Fits on all folds but one, scored on that one.

    Args:
        folds: All of them.
        kept: Those, of the kept columns and the outputs that are looked at, in the dtype to compute in.
        index: Of the one left out.
        W: `(n, m)`, of these outputs.
        columns: `(k,)` int64, the kept columns.
    """

    def __init__(
        self, folds: Sequence[Moments], kept: Sequence[Moments], index: int, W: torch.Tensor, columns: torch.Tensor
    ):
        others = [other for other in range(len(folds)) if other != index]
        H = combine([folds[other] for other in others]).H
        self.energy, self.W = float(H.diagonal().mean()), W[columns]
        self.rest, self.unseen = combine([kept[other] for other in others]), kept[index]
        self.own, self.mended = self.rest.C, None
        own = H[columns].to(W) @ W
        mended = self.rest.C - own
        if float(mended.square().sum()) > _NOTHING * float(own.square().sum()):
            self.own, self.mended = own, mended

    def left(self, shrinkage: float) -> torch.Tensor:
        """`(3,)` float64: the squared error on this fold's rows, less that of keeping nothing.

        A polynomial of the part of `C - H W` that counts: its coefficients, the constant one first.
        """
        V, mending = self._fit(shrinkage)
        rest, unseen = self.rest, self.unseen
        product = unseen.H @ V
        found = V.new_zeros(3, dtype=torch.float64)
        found[0] = (V * (product - 2 * unseen.C)).sum(dtype=torch.float64)
        if mending is not None:
            found[1] = 2 * (mending * (product - unseen.C)).sum(dtype=torch.float64)
            found[2] = (mending * (unseen.H @ mending)).sum(dtype=torch.float64)
        if rest.intercept:
            apart = rest.input_mean - unseen.input_mean
            mismatch = unseen.target_mean - rest.target_mean + apart @ V
            change = torch.zeros_like(mismatch) if mending is None else apart @ mending
            parts = [mismatch.square(), 2 * mismatch * change, change.square()]
            found += unseen.rows * torch.stack([part.sum(dtype=torch.float64) for part in parts])
        return found.cpu()

    def _fit(self, shrinkage: float) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weights `(k, m)` without what is cross-fitted, and what all of `C - H W` adds to them where it is."""
        if math.isinf(shrinkage):
            return self.W, None
        ridge = shrinkage * self.energy
        H = self.rest.H.clone()
        H.diagonal().add_(ridge)
        C = self.own + ridge * self.W
        if self.mended is None:
            return solve_normal_equations(H, C, C.dtype)[0], None
        both, _ = solve_normal_equations(H, torch.cat([C, self.mended], 1), C.dtype)
        V, mending = both.split(C.shape[1], 1)
        return V, mending


def _refined(grid: Sequence[float], errors: Sequence[float], folds: int) -> float:
    """The lambda to fit all rows with, from the errors of fits that left a fold out.

    The lowest point of the parabola through the best value and its neighbours, over log lambda; times
    `(folds - 1) / folds`, since the ridge that is best depends little on the number of rows (the prior is about the
    weights), and lambda multiplies moments that are sums over rows.
    """
    best = min(range(len(grid)), key=errors.__getitem__)
    low = grid[best]
    if 0 < best < len(grid) - 1 and grid[best - 1] > 0 and math.isfinite(grid[best + 1]):
        x = [math.log(value) for value in grid[best - 1 : best + 2]]
        y = errors[best - 1 : best + 2]
        left, right = (y[1] - y[0]) / (x[1] - x[0]), (y[2] - y[1]) / (x[2] - x[1])
        if right > left:  # slopes at the middles of the two intervals; zero in between
            low = math.exp((x[0] + x[1]) / 2 - left * (x[2] - x[0]) / 2 / (right - left))
    return low * (folds - 1) / folds
