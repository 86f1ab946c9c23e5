"""Second moments of a consumer's input: all that selection and reweighting need of the data.

Tensors only. Rows (tokens) stream through a `MomentAccumulator`; memory does not depend on their number.
"""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace

import torch
from accelerate.utils.memory import should_reduce_batch_size

# Products are split into this many column panels, of which only the upper triangle is computed.
_PANELS = 4
# So many rows, or numbers in them, are awaited: to add a product of few rows takes as long as to make it.
_ROWS_AT_ONCE = 1024
_NUMBERS_AT_ONCE = 1 << 21


@dataclass(frozen=True, eq=False)
class Moments:
    """Moments of a consumer's inputs `B` `(rows, n)` and targets `Y = A W` `(rows, m)`, without the bias.

    With an intercept `H`, `C` and `t` are those of `B - mean(B)` and `Y - mean(Y)`; without, of `B` and `Y`.

    Args:
        H: `(n, n)`, `B'B`, symmetric.
        C: `(n, m)`, `B'Y`.
        t: `||Y||_F^2`.
        rows: Number of rows (tokens) summed over.
        input_mean: `(n,)`, mean of `B` over the rows.
        target_mean: `(m,)`, mean of `Y` over the rows.
        intercept: Whether the consumer has a bias that can take up the means, which are then subtracted.
    """

    H: torch.Tensor
    C: torch.Tensor
    t: float
    rows: int
    input_mean: torch.Tensor
    target_mean: torch.Tensor
    intercept: bool


@dataclass(frozen=True, eq=False)
class Rows:
    """Some rows (tokens) of a consumer.

    Args:
        inputs: `(rows, n)`.
        targets: `(rows, m)`; `None` where these are the inputs times the consumer's weight.
        weights: `(rows,)`, how much each counts.
    """

    inputs: torch.Tensor
    targets: torch.Tensor | None
    weights: torch.Tensor

    def to(self, device: torch.device | str) -> "Rows":
        """The same rows on a device."""
        targets = None if self.targets is None else self.targets.to(device)
        return Rows(self.inputs.to(device), targets, self.weights.to(device))


class MomentAccumulator:
    """Sums second moments over batches of rows.

    A thousand rows or more are multiplied at a time, in their own precision, float32 at least, and added in `dtype`.
    They are shifted by the mean of the first batch before that, so that centring cancels no digits (intercept only).
    Rows that come with weights count as much as these say, in proportion: on average, a row counts once.

    Args:
        n: Number of consumer inputs.
        m: Number of targets, when targets are passed to `update` (variants `asym` and `residual`, whole experts);
            `None` when the target is the input times the consumer's weight (`layer`, `seq`), which needs no sums of
            its own.
        intercept: Whether moments are centred.
        dtype: Of the sums; float64 holds them to 1e-15 relative, float32 to about 1e-6.
        device: Where the sums live.
        keep_rows: Whether rows are kept as they are, as long as they take no more memory than the sums would.
    """

    def __init__(
        self,
        n: int,
        m: int | None = None,
        *,
        intercept: bool,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
        keep_rows: bool = False,
    ):
        self.n, self.m, self.intercept, self.dtype, self.keep_rows = n, m, intercept, dtype, keep_rows
        self.rows = 0
        self.shift: torch.Tensor | None = None
        self._waiting: list[Rows] = []
        self._weight = torch.zeros((), dtype=torch.float64, device=device)
        self._sum = torch.zeros(n, dtype=torch.float64, device=device)
        if not keep_rows:
            self._make_sums()
        if m is not None:
            self._target_sum = torch.zeros(m, dtype=torch.float64, device=device)
            self._target_square = torch.zeros((), dtype=torch.float64, device=device)

    def _make_sums(self) -> None:
        self.keep_rows = False
        self._gram = torch.zeros(self.n, self.n, dtype=self.dtype, device=self.device)  # upper triangle of panels only
        if self.m is not None:
            self._cross = torch.zeros(self.n, self.m, dtype=self.dtype, device=self.device)

    @property
    def device(self) -> torch.device:
        """Where the sums are."""
        return self._sum.device

    @property
    def kept_rows(self) -> "list[Rows] | None":
        """Of each `update`, with inputs less `shift` if there is one, while rows are kept."""
        return self._waiting if self.keep_rows else None

    def to(self, device: torch.device | str) -> "MomentAccumulator":
        """A copy on a device, of the sums and of rows that wait; nothing is computed where they are."""
        moved = copy(self)
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                setattr(moved, name, value.to(device, copy=True))
        moved._waiting = [rows.to(device) for rows in self._waiting]
        return moved

    def update(
        self, inputs: torch.Tensor, targets: torch.Tensor | None = None, weights: torch.Tensor | None = None
    ) -> None:
        """Add a batch of rows.

        Args:
            inputs: `(rows, n)`, any floating dtype; upcast to float32 before the product.
            targets: `(rows, m)`, the consumer's original output without its bias, when `m` was given; held on to for a
                while.
            weights: `(rows,)`, not negative, how much each row counts; all alike when left out.

        Raises:
            ValueError: the shapes do not fit, or targets are missing or unexpected.
        """
        if inputs.ndim != 2 or inputs.shape[1] != self.n:
            raise ValueError(f"Moments of {self.n} inputs take rows of that width, got shape {tuple(inputs.shape)}.")
        if (targets is None) != (self.m is None):
            raise ValueError("Targets must be passed exactly when the accumulator was made with `m`.")
        if len(inputs) == 0:
            return
        y = None
        if targets is not None:
            if targets.shape != (len(inputs), self.m):
                raise ValueError(f"Targets must have shape {(len(inputs), self.m)}, got {tuple(targets.shape)}.")
            y = targets.detach()
        x = inputs.detach().to(torch.promote_types(inputs.dtype, torch.float32), copy=not self.intercept)
        if self.intercept:
            if self.shift is None:
                self.shift = x.mean(0)
            x = x - self.shift.to(x)
        self.rows += len(x)
        w = x.new_ones(len(x)) if weights is None else weights.detach().to(x)
        waiting = Rows(x, y, w)
        self._waiting.append(waiting.to(self.device) if self.keep_rows else waiting)
        rows = sum(len(some.inputs) for some in self._waiting)
        if self.keep_rows:
            enough = rows * x.element_size() > self.n * self.dtype.itemsize
        else:
            enough = rows >= _ROWS_AT_ONCE or rows * self.n >= _NUMBERS_AT_ONCE
        if enough:
            self._add_up()

    def _add_up(self) -> None:
        """Multiply the rows that wait, and add their products."""
        if self.keep_rows:
            try:
                self._make_sums()
            except RuntimeError as error:
                if not should_reduce_batch_size(error):
                    raise
                vars(self).update(vars(self.to("cpu")))
                self._make_sums()
        while self._waiting:
            rows = self._taken()
            root = rows.weights.sqrt()[:, None]
            x = rows.inputs * root
            self._weight += rows.weights.sum(dtype=torch.float64).to(self.device)
            self._sum += (x * root).sum(0).to(self.device)
            for start, stop in self._panels():
                self._gram[start:stop, start:] += (x[:, start:stop].T @ x[:, start:]).to(self.device)
            if rows.targets is not None:
                y = rows.targets.to(x) * root
                self._cross += (x.T @ y).to(self.device)
                self._target_sum += (y * root).sum(0, dtype=torch.float64).to(self.device)  # not shifted
                self._target_square += y.square().sum(0).sum(dtype=torch.float64).to(self.device)

    def _taken(self) -> "Rows":
        """The rows that wait, or the first thousand of them and some; they wait no more."""
        count = rows = 0
        while count < len(self._waiting) and rows < _ROWS_AT_ONCE:
            rows += len(self._waiting[count].inputs)
            count += 1
        taken = self._waiting[:count]
        del self._waiting[:count]
        targets = [some.targets for some in taken if some.targets is not None]
        inputs, weights = [some.inputs for some in taken], [some.weights for some in taken]
        return Rows(torch.cat(inputs), torch.cat(targets) if targets else None, torch.cat(weights))

    def _panels(self) -> list[tuple[int, int]]:
        width = -(-self.n // _PANELS)
        return [(start, min(start + width, self.n)) for start in range(0, self.n, width)]

    def sums(self) -> list[torch.Tensor]:
        """The sums themselves, to be added to those of other rows with the same shift."""
        self._add_up()
        own = [self._gram, self._sum, self._weight]
        return own if self.m is None else [*own, self._cross, self._target_sum, self._target_square]

    def shift_sum(self) -> torch.Tensor:
        """`(n,)`, the shift times the number of rows; zeros without one."""
        return torch.zeros_like(self._sum) if self.shift is None else self.shift.to(self._sum) * self.rows

    def recentre(self, shift: torch.Tensor) -> None:
        """Change the sums to what they are with another shift, `(n,)`; nothing without an intercept."""
        if not self.intercept:
            return
        self._add_up()
        if self.shift is not None:
            d = self.shift.to(self._sum) - shift.to(self._sum)
            cross = torch.outer(d, self._sum)
            self._gram += (cross + cross.T + self._weight * torch.outer(d, d)).to(self.dtype)
            if self.m is not None:
                self._cross += torch.outer(d, self._target_sum).to(self.dtype)
            self._sum += self._weight * d
        self.shift = shift

    def moments(
        self, W: torch.Tensor | None = None, dtype: torch.dtype | None = None, *, last: bool = False
    ) -> Moments:
        """The moments of everything added so far.

        Args:
            W: `(n, m)`, the consumer's weight, inputs by outputs; required when no targets were added, for which the
                target is `B W`.
            dtype: Of the result; that of the sums when `None`.
            last: Whether nothing more is asked of the accumulator: sums of the result's dtype turn into it where they
                are, others are let go of.

        Raises:
            ValueError: no row was added, or the weight is missing.
        """
        if self.rows == 0:
            raise ValueError("No row was added: there are no moments to compute.")
        self._add_up()
        weight = float(self._weight)
        if not weight > 0:
            raise ValueError("All rows weigh nothing: there are no moments to compute.")
        each = self.rows / weight
        mean = self._sum / weight
        input_mean, root = mean, None
        if self.intercept:
            root = (self._sum / weight**0.5).to(self.dtype)
            input_mean = mean + self.shift.to(mean)  # type: ignore[union-attr]
        in_place = last and dtype in (None, self.dtype)
        H = self._gram if in_place else torch.empty_like(self._gram, dtype=dtype)
        for start, stop in self._panels():
            rows = self._gram[start:stop, start:].clone()
            if root is not None:
                rows.addr_(root[start:stop], root[start:], alpha=-1)
            rows *= each
            H[start:stop, start:] = rows
            H[start:, start:stop] = rows.T
            corner = H[start:stop, start:stop]
            corner.copy_(corner.triu() + corner.triu(1).T)
        if last:
            del self._gram
        input_mean = input_mean.to(H)
        if self.m is None:
            if W is None:
                raise ValueError("The consumer's weight is needed: no targets were added.")
            W = W.detach().to(H)
            C = H @ W
            t = float((W * C).sum(dtype=torch.float64))
            return Moments(H, C, t, self.rows, input_mean, input_mean @ W, self.intercept)
        C, t = self._cross.to(H, copy=not in_place), float(self._target_square)
        if last:
            del self._cross
        target_mean = self._target_sum / weight
        if self.intercept:
            C.addr_(self._sum.to(C), target_mean.to(C), alpha=-1)
            t -= float(self._target_sum @ target_mean)
        C, t = C.mul_(each), t * each
        return Moments(H, C, t, self.rows, input_mean, target_mean.to(H), self.intercept)


def combine(parts: Sequence[Moments]) -> Moments:
    """Moments of the rows of all parts together; centred ones are shifted to the common mean first.

    Raises:
        ValueError: no part was given, or some parts are centred and some are not.
    """
    if not parts:
        raise ValueError("There are no moments to combine.")
    first = parts[0]
    if len(parts) == 1:
        return first
    if len({part.intercept for part in parts}) > 1:
        raise ValueError("Centred and raw moments cannot be combined.")
    rows = sum(part.rows for part in parts)
    input_mean, target_mean = torch.zeros_like(first.input_mean), torch.zeros_like(first.target_mean)
    H, C, t = torch.zeros_like(first.H), torch.zeros_like(first.C), 0.0
    for part in parts:
        H += part.H
        C += part.C
        t += part.t
        input_mean += part.input_mean * (part.rows / rows)
        target_mean += part.target_mean * (part.rows / rows)
    if first.intercept:
        for part in parts:
            x, y = part.input_mean - input_mean, part.target_mean - target_mean
            H.addr_(x, x, alpha=part.rows)
            C.addr_(x, y, alpha=part.rows)
            t += part.rows * float(y.square().sum(dtype=torch.float64))
    return Moments(H, C, t, rows, input_mean, target_mean, first.intercept)


def unseen(W: torch.Tensor, parts: Sequence[Moments], intercept: bool) -> Moments:
    """Moments in the place of those of rows that never came: of uncorrelated inputs, as large as those of other parts.

    With them alone, the units to keep are those with the largest weights, and their weights stay as they are; with
    others, they pull towards that.

    Args:
        W: `(n, m)`, the consumer's weight, inputs by outputs.
        parts: Moments of the rows that came, if any.
        intercept: Whether moments are centred.
    """
    rows = max((part.rows for part in parts), default=1)
    scale = max((float(part.H.diagonal().mean()) for part in parts), default=1.0)
    W = W.detach().to(parts[0].H if parts else torch.float64)
    H = torch.eye(len(W), dtype=W.dtype, device=W.device) * scale
    t = scale * float(W.square().sum(dtype=torch.float64))
    return Moments(H, scale * W, t, rows, W.new_zeros(len(W)), W.new_zeros(W.shape[1]), intercept)


def restrict(moments: Moments, columns: torch.Tensor, dtype: torch.dtype | None = None) -> Moments:
    """The moments of some of the inputs and of all targets.

    Args:
        moments: Of all inputs.
        columns: `(k,)` int64, the inputs.
        dtype: Of the result; that of the moments when `None`.
    """
    at = columns.to(moments.H.device)
    return replace(
        moments,
        H=moments.H[at[:, None], at].to(dtype),
        C=moments.C[at].to(dtype),
        input_mean=moments.input_mean[at].to(dtype),
        target_mean=moments.target_mean.to(dtype),
    )
