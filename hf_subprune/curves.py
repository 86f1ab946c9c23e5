"""A block's loss at every width, from its moments: what budgets are made of. Tensors only."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from .moments import Moments, combine
from .problem import columns_of
from .reweighting import reweight
from .selection import greedy, nested
from .solver import PRIOR_SHRINKAGE, metric_root, regularise

# Fractions of the units at which the loss is computed; in between it is interpolated.
_FRACTIONS = (0.03, 0.08, 0.15, 0.25, 0.35, 0.5, 0.7, 0.9)


@dataclass(frozen=True, eq=False)
class Trial:
    """A block at one width, fitted on the first fold.

    Args:
        kept: `(k,)` int64, sorted units.
        V: `(k * c, m)`, new weights.
        bias_shift: `(m,)`.
        error: On the other folds' rows, in the units of the metric, a row.
    """

    kept: torch.Tensor
    V: torch.Tensor
    bias_shift: torch.Tensor
    error: float


@dataclass(frozen=True, eq=False)
class LossCurve:
    """Error of a block's output on unseen rows against its width, along nested greedy sets.

    Args:
        points: `(width, error)`, ascending, the full width with error 0 last; in the units of the metric, a row.
        relative: `(units + 1,)` float64, error of the objective that greedy minimises on the rows it saw, as a
            fraction of that of keeping nothing.
        order: `(units,)` int64; the first `k` are the greedy set of size `k`.
        trials: By width, for the widths that were asked for.
    """

    points: tuple[tuple[int, float], ...]
    relative: torch.Tensor
    order: torch.Tensor
    trials: dict[int, Trial]

    def of_share(self, share: float) -> "LossCurve":
        """The curve of a block that this share of the rows reaches, as an expert: its loss a row of all of them."""
        points = tuple((width, share * error) for width, error in self.points)
        trials = {width: replace(trial, error=share * trial.error) for width, trial in self.trials.items()}
        return replace(self, points=points, trials=trials)


def loss_curve(
    folds: Sequence[Moments],
    W: torch.Tensor,
    groups: torch.Tensor,
    *,
    shrinkage: float | str = "auto",
    output_metric: torch.Tensor | None = None,
    reweight_kept: bool = True,
    trial_fractions: Sequence[float] = (),
    order: torch.Tensor | None = None,
) -> LossCurve:
    """One greedy run for the nested sets, then fits on one fold scored on the other at some eight widths.

    Fits on half of the rows overfit more than the fit on all of them will: to first order the excess of the error on
    unseen rows over the noise goes with 1 / rows, and the error on the rows fitted on falls short by as much. Of fits
    on one of two folds, the error to expect of a fit on both is then 3/4 of the unseen plus 1/4 of the fitted error.

    Args:
        folds: Moments of disjoint parts of the calibration rows; with one fold, errors are those fitted.
        W: `(n, m)`, the consumer's weight, inputs by outputs.
        groups: `(units, c)` int64, columns of each unit.
        shrinkage: lambda; 0.1 for `"auto"`.
        output_metric: `(m, m)`, `M`, which weighs errors; all outputs count alike without.
        reweight_kept: Whether the weights on kept units are solved for.
        trial_fractions: Of the units, for the widths whose fits are returned; they need two folds.
        order: `(units,)` int64, whose beginnings are the nested sets, for a block that must keep what others keep; one
            greedy run chooses them without.
    """
    shrinkage = PRIOR_SHRINKAGE if shrinkage == "auto" else float(shrinkage)
    root = None if output_metric is None else metric_root(output_metric)
    total = combine(folds)
    H, C, t = regularise(total, W, shrinkage, root)
    units = len(groups)
    path = greedy(H, C, units, groups=groups, t=t) if order is None else nested(H, C, order, groups, t)
    del H, C
    tried = {_width(units, f) for f in trial_fractions} if len(folds) > 1 else set()
    scored = [_Scored(fold, W, root) for fold in folds]
    points, trials = [], {}
    for width in sorted({_width(units, f) for f in _FRACTIONS} | tried):
        if width == units:
            continue
        kept = path.kept(width)
        columns = columns_of(kept, groups)
        fitted = unseen = 0.0
        for index, fold in enumerate(folds):
            V, shift = W.to(fold.H)[columns], torch.zeros_like(fold.target_mean)
            if reweight_kept:
                new = reweight(fold, W, columns, shrinkage)
                V, shift = new.V, new.bias_shift
            fitted += scored[index].error(columns, V, shift)
            rest = [s.error(columns, V, shift) for i, s in enumerate(scored) if i != index]
            unseen += sum(rest) / max(len(folds) - 1, 1)
            if index == 0 and width in tried:
                trials[width] = Trial(kept, V, shift, sum(rest) / sum(f.rows for f in folds[1:]))
        error = (0.75 * unseen + 0.25 * fitted if len(folds) > 1 else fitted) / total.rows
        points.append((width, error))
    relative = path.errors / t if t > 0 else torch.zeros_like(path.errors)
    return LossCurve((*points, (units, 0.0)), relative, path.order, trials)


def _width(units: int, fraction: float) -> int:
    return max(1, math.floor(fraction * units))


class _Scored:
    """Errors on the rows of some moments, weighed by `root root'`."""

    def __init__(self, moments: Moments, W: torch.Tensor, root: torch.Tensor | None):
        self.moments = moments
        self.root = None if root is None else root.to(moments.H)
        self.C = moments.C if self.root is None else moments.C @ self.root
        # With a root, the target is the input times the weight: that of another model has no such sums.
        self.t = moments.t if self.root is None else float(((W.to(moments.H) @ self.root) * self.C).sum())

    def error(self, columns: torch.Tensor, V: torch.Tensor, shift: torch.Tensor) -> float:
        moments, root = self.moments, self.root
        mismatch = moments.target_mean - moments.input_mean[columns] @ V - shift
        if root is not None:
            V, mismatch = V @ root, mismatch @ root
        H = moments.H[columns][:, columns]
        error = self.t + float((V * (H @ V - 2 * self.C[columns])).sum())
        if moments.intercept:
            error += moments.rows * float(mismatch.square().sum())
        return max(error, 0.0)
