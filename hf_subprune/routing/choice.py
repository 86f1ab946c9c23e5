"""Remove whole experts from mixture-of-experts layers: those without which the layer's output changes least.

A token whose expert is gone is sent to the next best one by the router itself, so that the change of the output is
not that of leaving a part out. With `y_e` the output of expert `e`, and `g` and `g_S` the weights that the router
gives to all experts and to those in `S` (zero for those not chosen), the error is `||sum_e (g_e - g_S,e) y_e||^2`,
summed over the tokens: a quadratic form in the Gram matrix of the experts' outputs for each token, whatever `S` is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..models.experts import SECOND
from ..solver.moments import MomentAccumulator, combine
from ..solver.reweighting import cross_fit, reweight
from .tokens import RoutedTokens

# Tokens of a layer that removals are tried on, those whose outputs of all experts are held at a time, and rounds in
# which experts go.
_TOKENS = 4096
_CHUNK = 512
_ROUNDS = 16


@dataclass(frozen=True, eq=False)
class Removal:
    """What to do to one layer.

    Args:
        kept: `(k,)` int64, sorted experts.
        parameters: By dotted path, the new stack of their second projections; empty where weights stay.
        fitted_error: Relative squared error of the layer's routed output on the tokens fitted on.
        held_out_error: The same on held-out tokens.
    """

    kept: torch.Tensor
    parameters: dict[str, torch.Tensor]
    fitted_error: float
    held_out_error: float


def choose_experts(tokens: RoutedTokens, k: int) -> torch.Tensor:
    """The `k` experts left when those go, round by round, without which the layer's output changes least.

    Args:
        tokens: Of the layer.
        k: Number of experts to keep, at least as many as a token is sent to.

    Returns:
        `(k,)` int64, sorted.
    """
    inputs = torch.cat(tokens.fit)[:_TOKENS]
    kept = torch.arange(tokens.routed.block.units)
    hidden, whole = tokens.route(inputs, kept)
    gram = torch.cat([_gram(tokens, part) for part in hidden.split(_CHUNK)])
    left, errors = whole, whole.new_zeros(len(whole))
    step = max(1, (len(kept) - k) // _ROUNDS)
    while len(kept) > k:
        costs = []
        for expert in kept.tolist():
            at = left[:, expert].nonzero().flatten()  # others are routed as before
            cost = 0.0
            if len(at):
                _, without = tokens.route(inputs[at], kept[kept != expert])
                cost = float((_errors(gram[at], whole[at] - without) - errors[at]).sum())
            costs.append(cost)
        going = torch.tensor(costs).topk(min(step, len(kept) - k), largest=False).indices
        stays = torch.ones(len(kept), dtype=torch.bool)
        stays[going] = False
        kept = kept[stays]
        _, left = tokens.route(inputs, kept)
        errors = _errors(gram, whole - left)
    return kept


def _gram(tokens: RoutedTokens, hidden: torch.Tensor) -> torch.Tensor:
    """`(T, experts, experts)`: inner products of what the experts make of each token."""
    Y = torch.stack([tokens.outputs(expert, hidden) for expert in range(tokens.routed.block.units)], 1)
    return Y @ Y.mT


def _errors(gram: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    """`(T,)`: squared error of each token's output for a change `(T, experts)` of its weights."""
    return (torch.bmm(change[:, None], gram)[:, 0] * change).sum(1)


class _Residual:
    """What the layer with fewer experts still misses of the output of the whole one, on some batches.

    Attributes:
        missing: `(T, d)` float32.
        energy: Of the whole layer's output.
    """

    def __init__(self, tokens: RoutedTokens, batches: Sequence[torch.Tensor], kept: torch.Tensor) -> None:
        inputs = torch.cat(list(batches))
        self.tokens = tokens
        self.hidden, before = tokens.route(inputs, torch.arange(tokens.routed.block.units))
        _, self.gates = tokens.route(inputs, kept)
        folds = [torch.full((len(batch),), at % 2, device=batch.device) for at, batch in enumerate(batches)]
        self.fold = torch.cat(folds)
        output = torch.zeros_like(self.hidden, dtype=torch.float32)
        self.missing = torch.zeros_like(output)
        for expert in range(tokens.routed.block.units):
            at = ((before[:, expert] != 0) | (self.gates[:, expert] != 0)).nonzero().flatten()
            part = tokens.outputs(expert, self.hidden[at])
            output[at] += before[at, expert, None] * part
            self.missing[at] += (before - self.gates)[at, expert, None] * part
        self.energy = float(output.square().sum(dtype=torch.float64))

    def rows(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens that are sent to an expert, `(t,)` int64, and what its second projection reads, weighed, `(t, n)`."""
        at = self.gates[:, expert].nonzero().flatten()
        return at, self.gates[at, expert, None] * self.tokens.inner(expert, self.hidden[at])

    @property
    def error(self) -> float:
        """Relative squared error."""
        return float(self.missing.square().sum(dtype=torch.float64)) / self.energy if self.energy > 0 else 0.0


def fit_experts(
    tokens: RoutedTokens, kept: torch.Tensor, *, shrinkage: float | str = "auto", reweight_kept: bool = True
) -> Removal:
    """New second projections for the experts that stay, so that they make up for those that go.

    One expert after the other is fitted to what the others still miss of the whole layer's output (Gauss-Seidel), with
    the pull towards the original weights that the rest of the package has.

    Args:
        tokens: Of the layer.
        kept: `(k,)` int64, sorted experts.
        shrinkage: lambda, or `"auto"` to cross-fit it for each expert.
        reweight_kept: `False` leaves all weights as they are; so does a norm behind the second projection.
    """
    fit, held_out = _Residual(tokens, tokens.fit, kept), _Residual(tokens, tokens.held_out, kept)
    if not reweight_kept or tokens.experts.normed:
        return Removal(kept, {}, fit.error, held_out.error)
    weights = {}
    for expert in sorted(kept.tolist(), key=lambda one: -int((fit.gates[:, one] != 0).sum())):
        W = tokens.experts.experts[expert].second.weight.detach().T.float()
        V = _fitted(fit, expert, W, shrinkage)
        for part in (fit, held_out):
            at, rows = part.rows(expert)
            part.missing[at] -= rows @ (V - W)
        weights[expert] = V if tokens.experts.form.transposed else V.T
    stack = torch.stack([weights[expert] for expert in kept.tolist()])
    return Removal(kept, {f"{tokens.routed.block.name}.{SECOND}": stack}, fit.error, held_out.error)


def _fitted(fit: _Residual, expert: int, W: torch.Tensor, shrinkage: float | str) -> torch.Tensor:
    at, rows = fit.rows(expert)
    targets = fit.missing[at] + rows @ W
    folds = []
    for fold in range(2):
        inside = fit.fold[at] == fold
        if inside.any():
            sums = MomentAccumulator(*W.shape, intercept=False, device=W.device)
            sums.update(rows[inside], targets[inside])
            folds.append(sums.moments())
    columns, mending = torch.arange(len(W), device=W.device), 1.0
    if shrinkage == "auto":
        if len(folds) < 2:
            return W
        found = cross_fit(folds, W, columns)
        shrinkage, mending = found.shrinkage, found.mending
    return reweight(combine(folds), W, columns, float(shrinkage), mending).V.float() if folds else W
