"""A block's loss at every width, from its moments: what budgets are made of.

Along the nested sets S of one greedy run, with V fitted as by `reweighting`, a loss is `tr(E M E') / rows` with
`E = A W - B_S V` `(rows, m)` and a metric `M = E[g g']` `(m, m)`, g the gradient of a loss at the consumer's output:
losses of different blocks compare. Budgets by equal loss (El Halabi et al. 2022, after Kuzmin et al., arXiv
1912.09802) and global ones read it. Tensors only.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from .factorisation import factorise
from .moments import Moments, restrict
from .objective import objective_of
from .problem import Problem
from .selection import greedy, nested
from .settings import Settings

# Fractions of the units at which the loss is computed; in between it is interpolated.
_FRACTIONS = (0.03, 0.08, 0.15, 0.25, 0.35, 0.5, 0.7, 0.9)
# Up to this many columns fits are in float64; wider ones in float32, losses being compared to a few digits.
_DOUBLE_BELOW = 256


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
        points: `(width, error)`, ascending from width 0, the full width with error 0 last; in the units of the metric,
            a row.
        errors: `(width, fitted, held out)`, ascending: relative error of the output, all outputs alike, to expect of a
            fit on all rows, on these rows and on others; without the full width.
        order: `(units,)` int64; the first `k` are the greedy set of size `k`.
        trials: By width, for the widths that were asked for.
    """

    points: tuple[tuple[int, float], ...]
    errors: tuple[tuple[int, float, float], ...]
    order: torch.Tensor
    trials: dict[int, Trial]

    def of_share(self, share: float) -> "LossCurve":
        """The curve of a block that this share of the rows reaches, as an expert: its loss a row of all of them."""
        points = tuple((width, share * error) for width, error in self.points)
        trials = {width: replace(trial, error=share * trial.error) for width, trial in self.trials.items()}
        return replace(self, points=points, trials=trials)


def loss_curve(
    problem: Problem,
    settings: Settings,
    *,
    trial_fractions: Sequence[float] = (),
    order: torch.Tensor | None = None,
) -> LossCurve:
    """One greedy run for the nested sets, then fits on one fold scored on the other at some nine widths, 0 among them.

    Args:
        problem: Of the block; with one fold, errors are those fitted.
        settings: `shrinkage`, of which 0.1 is used for `"auto"`, and `reweight` are read.
        trial_fractions: Of the units, for the widths whose fits are returned; they need two folds.
        order: `(units,)` int64, whose beginnings are the nested sets, for a block that must keep what others keep; one
            greedy run chooses them without.
    """
    problem = replace(problem, sets=1)  # beginnings of the path are of any size
    folds, groups, units = problem.folds, problem.columns, problem.units
    root = problem.metric_root()
    objective = objective_of(problem, settings)
    path = greedy(objective, units, tuning=settings.tuning) if order is None else nested(objective, order)
    del objective
    tried = {_width(units, f) for f in trial_fractions} if len(folds) > 1 else set()
    parts = _parts(problem, groups[path.order.to(groups.device)].reshape(-1), root, settings)
    energy, rows = sum(fold.t for fold in folds), sum(fold.rows for fold in folds)
    points, errors, trials = [], [], {}
    for width in sorted({0, *(_width(units, f) for f in _FRACTIONS)} | tried):
        if width == units:
            continue
        fits = [part.fit(width * groups.shape[1]) for part in parts]
        table = _table(parts, fits)
        if width in tried:
            V, shift = fits[0]
            place = path.order[:width].argsort().to(V.device)
            sorted_V = V.view(width, -1, V.shape[1])[place].flatten(0, 1)
            error = float(table[0, 1:, 1].sum()) / sum(f.rows for f in folds[1:])
            trials[width] = Trial(path.kept(width), sorted_V, shift, error)
        fitted, unseen = _to_expect(table)
        points.append((width, float(unseen[1]) / rows))
        if energy > 0:
            errors.append((width, float(fitted[0]) / energy, float(unseen[0]) / energy))
    return LossCurve((*points, (units, 0.0)), tuple(errors), path.order, trials)


def losses_of_sets(problem: Problem, settings: Settings) -> tuple[tuple[int, float], ...]:
    """`LossCurve.points` where as many units of each set are kept, at every such width but the full one."""
    objective = objective_of(problem, settings)
    points = []
    for width in range(problem.sets, problem.units, problem.sets):
        columns = objective.columns(greedy(objective, width, tuning=settings.tuning).kept(width))
        points.append((width, expected_loss(problem, columns, settings)))
    return tuple(points)


def expected_loss(problem: Problem, columns: torch.Tensor, settings: Settings) -> float:
    """What a block loses that keeps some columns `(k,)`: the error that `loss_curve` has at a width."""
    others = torch.ones(len(problem.W), dtype=torch.bool, device=columns.device).index_fill(0, columns, False)
    along = torch.cat([columns, others.nonzero()[:, 0]])
    parts = _parts(problem, along, problem.metric_root(), settings)
    _, unseen = _to_expect(_table(parts, [part.fit(len(columns)) for part in parts]))
    return float(unseen[1]) / sum(fold.rows for fold in problem.folds)


def _parts(problem: Problem, along: torch.Tensor, root: torch.Tensor | None, settings: Settings) -> list["_Fold"]:
    shrinkage = settings.fixed_shrinkage if settings.reweight else None
    W = problem.W if shrinkage is None else problem.redundancy.folded(problem.W)
    return [_Fold(fold, W, along, root, shrinkage) for fold in problem.folds]


def _table(parts: Sequence["_Fold"], fits: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """`(folds, folds, 2)` float64, the errors of each fold's fit on the rows of each."""
    return torch.stack([torch.stack([part.errors(*fit) for part in parts]) for fit in fits])


def _to_expect(errors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Errors to expect of a fit on all folds, from those of fits on each of them.

    Fits on half of the rows overfit more than the fit on all of them will: to first order the excess of the error on
    unseen rows over the noise goes with 1 / rows, and the error on the rows fitted on falls short by as much. Of fits
    on one of two folds, the error to expect of a fit on both is then 3/4 of the unseen plus 1/4 of the fitted error,
    and on the rows fitted on the other way round.

    Args:
        errors: `(folds, folds, 2)`, of a fit on the one fold, on the rows of the other.

    Returns:
        `(2,)` each: on the rows fitted on, and on as many others.
    """
    fitted = errors.diagonal().sum(1)
    unseen = (errors.sum((0, 1)) - fitted) / (len(errors) - 1) if len(errors) > 1 else fitted
    return 0.75 * fitted + 0.25 * unseen, 0.25 * fitted + 0.75 * unseen


def _width(units: int, fraction: float) -> int:
    return max(1, math.floor(fraction * units))


class _Fold:
    """Fits on one fold, and errors on it, of the nested sets of a path.

    The columns are in the order of the path: one Cholesky factor, and one forward substitution, are those of all sets.

    Args:
        moments: Of the fold.
        W: `(n, m)`.
        along: `(n,)` int64, the columns in the order of the path.
        root: `(m, r)` with `M = root root'`, which weighs errors.
        shrinkage: lambda of the fits; `None` leaves the weights as they are.
    """

    def __init__(
        self,
        moments: Moments,
        W: torch.Tensor,
        along: torch.Tensor,
        root: torch.Tensor | None,
        shrinkage: float | None,
    ):
        kept = restrict(moments, along, torch.float32 if len(along) > _DOUBLE_BELOW else torch.float64)
        self.moments, self.W = kept, W.to(kept.H)[along]
        self.root = None if root is None else root.to(kept.H)
        if self.root is not None:
            # With a root, the target is the input times the weight: that of another model has no such sums.
            self.C = kept.C @ self.root
            self.t = float(((self.W @ self.root) * self.C).sum(dtype=torch.float64))
        self._factor: torch.Tensor | None = None
        if shrinkage is not None:
            ridge = shrinkage * float(kept.H.diagonal().mean())
            H = kept.H.clone()
            H.diagonal().add_(ridge)
            self._factor, self._scale, _ = factorise(H, dtype=H.dtype)
            scaled = (kept.C + ridge * self.W) * self._scale[:, None]
            self._half = torch.linalg.solve_triangular(self._factor, scaled, upper=False)

    def fit(self, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """New weights `(k, m)` of the first `k` columns, and the change of the bias `(m,)`."""
        if self._factor is None:
            return self.W[:k], torch.zeros_like(self.moments.target_mean)
        V = torch.linalg.solve_triangular(self._factor[:k, :k].T, self._half[:k], upper=True) * self._scale[:k, None]
        shift = torch.zeros_like(self.moments.target_mean)
        if self.moments.intercept:
            shift = self.moments.target_mean - self.moments.input_mean[:k] @ V
        return V, shift

    def errors(self, V: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        """The squared error that weights of the first columns make on the fold's rows.

        Args:
            V: `(k, m)`.
            shift: `(m,)`, the change of the bias.

        Returns:
            `(2,)` float64 on the CPU: of all outputs alike, and in the units of the metric.
        """
        moments, root, k = self.moments, self.root, len(V)
        mismatch = moments.target_mean - moments.input_mean[:k] @ V - shift
        product = moments.H[:k, :k] @ V
        alike = self._error(moments.t, V, product, moments.C[:k], mismatch)
        if root is None:
            return torch.tensor([alike, alike], dtype=torch.float64)
        weighed = self._error(self.t, V @ root, product @ root, self.C[:k], mismatch @ root)
        return torch.tensor([alike, weighed], dtype=torch.float64)

    def _error(
        self, t: float, V: torch.Tensor, product: torch.Tensor, C: torch.Tensor, mismatch: torch.Tensor
    ) -> float:
        error = t + float((V * (product - 2 * C)).sum(dtype=torch.float64))
        if self.moments.intercept:
            error += self.moments.rows * float(mismatch.square().sum(dtype=torch.float64))
        return max(error, 0.0)
