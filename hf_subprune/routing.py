"""Remove whole experts from mixture-of-experts layers: those without which the layer's output changes least.

A token whose expert is gone is sent to the next best one by the router itself, so that the change of the output is
not that of leaving a part out. With `y_e` the output of expert `e`, and `g` and `g_S` the weights that the router
gives to all experts and to those in `S` (zero for those not chosen), the error is `||sum_e (g_e - g_S,e) y_e||^2`,
summed over the tokens: a quadratic form in the Gram matrix of the experts' outputs for each token, whatever `S` is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from .advance import Stream, call, plan
from .blocks import Attribute, Block, Refusal, Slice, parameters_per_unit
from .calibration import CalibrationSet
from .experts import SECOND, understood
from .moments import MomentAccumulator, combine
from .reweighting import cross_fit, reweight
from .surgery import shrink
from .verification import EquivalenceError, verify

# Tokens of a layer that removals are tried on, those whose outputs of all experts are held at a time, and rounds in
# which experts go.
_TOKENS = 4096
_CHUNK = 512
_ROUNDS = 16

_LINEAR = (nn.functional.linear, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)


@dataclass(frozen=True, eq=False)
class RoutedLayer:
    """A layer whose experts can be removed.

    Args:
        block: Its units are the experts; the consumer is the module that stacks them.
        layer: Dotted path of the module that routes.
        chosen: Number of experts that a token is sent to: as many must stay.
    """

    block: Block
    layer: str
    chosen: int


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


def routed_layers(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[list[RoutedLayer], list[Refusal]]:
    """The layers of which whole experts can be taken, found by their parameters and one forward.

    The rows of a router are those tensors of the module that routes, and of its children, that have one entry for
    each expert. Whether that is all that there is to it, `verification.verify` says.
    """
    found: list[RoutedLayer] = []
    refusals = []
    for path, module in model.named_modules():
        experts = understood(module)
        if experts is None:
            continue
        layer = path.rpartition(".")[0]
        calls = _calls(model, (layer, path), inputs)
        if not experts.form.routed:
            reason = "its tokens come expert by expert, so that what routes them cannot be told"
        elif [len(call) for call in calls] != [1, 3]:
            reason = f"{layer!r} is not called once with hidden states alone"
        else:
            block = _block(model, path, layer, len(experts.experts))
            if not found:
                block = replace(block, attributes=(*block.attributes, *_attributes_above(model, block, layer)))
            found.append(RoutedLayer(block, layer, calls[1][1].shape[-1]))
            continue
        refusals.append(Refusal(path, "experts", reason, "Nothing is needed: all of its experts are kept."))
    return found, refusals


def verify_routed(
    model: nn.Module,
    layers: Sequence[RoutedLayer],
    kept: Mapping[str, torch.Tensor],
    inputs: Mapping[str, Any],
) -> None:
    """Check that removing experts equals a router that never chooses them, as `verification.verify` does for units.

    Raises:
        EquivalenceError: outputs differ, or it cannot run.
    """
    by_name = {routed.block.name: routed for routed in layers}
    verify(
        model,
        [routed.block for routed in layers],
        kept,
        inputs,
        masking=lambda model, block, kept: unrouted(model, by_name[block.name], kept),
    )


def exact_layers(
    model: nn.Module, layers: Sequence[RoutedLayer], inputs: Mapping[str, Any]
) -> tuple[list[RoutedLayer], list[Refusal]]:
    """The layers that compute exactly what they should with as few experts as can be, and refusals of the others."""
    fewest = {}
    for number, routed in enumerate(layers):
        random = torch.Generator().manual_seed(number)
        some = torch.randperm(routed.block.units, generator=random)[: routed.chosen]
        fewest[routed.block.name] = some.sort().values
    try:
        verify_routed(model, layers, fewest, inputs)
        return list(layers), []
    except EquivalenceError:
        pass  # which of them it is that is wrong is found one by one
    exact, refusals = [], []
    for routed in layers:
        try:
            verify_routed(model, [routed], fewest, inputs)
            exact.append(routed)
        except EquivalenceError as error:
            advice = "Nothing is needed: all of its experts are kept."
            refusals.append(Refusal(routed.block.name, "experts", error.reason, advice))
    return exact, refusals


def _calls(model: nn.Module, paths: Sequence[str], inputs: Mapping[str, Any]) -> list[list[torch.Tensor]]:
    """The tensors that each module is called with in one forward, of all of its calls together."""
    seen: dict[str, list[torch.Tensor]] = {path: [] for path in paths}

    def note(path: str) -> Callable[..., None]:
        return lambda _, args, kwargs: seen[path].extend(
            value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)
        )

    handles = [model.get_submodule(path).register_forward_pre_hook(note(path), with_kwargs=True) for path in paths]
    try:
        call(model, dict(inputs))
    finally:
        for handle in handles:
            handle.remove()
    return list(seen.values())


def _block(model: nn.Module, path: str, layer: str, experts: int) -> Block:
    index = torch.arange(experts)[:, None]
    slices, attributes = [], []
    for name, module in model.get_submodule(layer).named_modules(prefix=layer):
        tensors = dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))
        for leaf, tensor in tensors.items():
            if tensor.shape[:1] == (experts,):
                slices.append(Slice(f"{name}.{leaf}", 0, index))
            elif tensor.shape == (1, experts):
                slices.append(Slice(f"{name}.{leaf}", 1, index))
        attributes += _counts(name, module, experts)
    parameters = dict(model.named_parameters())
    return Block(
        name=path,
        kind="experts",
        consumer=path,
        columns=index,
        slices=tuple(slices),
        attributes=tuple(attributes),
        parameters_per_unit=parameters_per_unit(model, [one for one in slices if one.tensor in parameters]),
    )


def _attributes_above(model: nn.Module, block: Block, layer: str) -> list[Attribute]:
    """Numbers of experts that the modules around a layer hold, the model among them: all layers keep equally many."""
    parts = layer.split(".")
    return [
        attribute
        for end in range(len(parts))
        for attribute in _counts(".".join(parts[:end]), model.get_submodule(".".join(parts[:end])), block.units)
    ]


def _counts(path: str, module: nn.Module, experts: int) -> list[Attribute]:
    return [
        Attribute(path, name, experts, 1)
        for name, value in vars(module).items()
        if type(value) is int and value == experts and "expert" in name
    ]


class RoutedTokens:
    """The tokens that reach one layer, and how its router sends them on to any part of its experts.

    Args:
        model: Whole, its experts stacked.
        routed: The layer.
        calibration: What the tokens come from.
    """

    def __init__(self, model: nn.Module, routed: RoutedLayer, calibration: CalibrationSet) -> None:
        self.model, self.routed, self.calibration = model, routed, calibration
        experts = understood(model.get_submodule(routed.block.name))
        assert experts is not None  # or else it would not be a routed layer
        experts.every = True
        self.experts = experts
        self._batches: list[torch.Tensor] = []
        router = [piece for piece in routed.block.slices if not piece.tensor.startswith(f"{routed.block.name}.")]
        self._router = replace(routed.block, slices=tuple(router))

    def add(self, inputs: torch.Tensor) -> None:
        """What the layer is called with; batches come in the order of the calibration."""
        self._batches.append(self.calibration.rows(inputs, len(self._batches), self.routed.layer))

    @property
    def fit(self) -> list[torch.Tensor]:
        """`(T, d)` real tokens of each batch to fit on."""
        return self._batches[: len(self.calibration.fit)]

    @property
    def held_out(self) -> list[torch.Tensor]:
        """The same of the held-out batches."""
        return self._batches[len(self.calibration.fit) :]

    @torch.no_grad()
    def route(self, inputs: torch.Tensor, kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the experts are called with for some tokens, and the weight that the router gives to each expert.

        Args:
            inputs: `(T, d)`, of the layer.
            kept: `(k,)` int64, sorted: experts that the router knows.

        Returns:
            `(T, h)`, and `(T, experts)` float32, zeros for experts that a token is not sent to.
        """
        module = self.model.get_submodule(self.routed.block.name)
        layer = self.model.get_submodule(self.routed.layer)
        edit = shrink(self.model, self._router, kept) if len(kept) < self.routed.block.units else None
        seen: list[torch.Tensor] = []

        def record(*args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
            seen.extend((*args, *kwargs.values()))
            return torch.zeros_like(seen[0])

        module.__dict__["forward"] = record
        try:
            layer(inputs[None])
        finally:
            del module.__dict__["forward"]
            if edit is not None:
                edit.undo()
        hidden, index, weights = seen
        gates = weights.new_zeros(len(hidden), self.routed.block.units, dtype=torch.float32)
        return hidden, gates.scatter_add_(1, kept.to(index.device)[index], weights.float())

    @torch.no_grad()
    def outputs(self, expert: int, hidden: torch.Tensor) -> torch.Tensor:
        """`(T, d)` float32: what one expert makes of the tokens, with weight 1."""
        return self.experts.run(self.experts.experts[expert], hidden, hidden.new_ones(len(hidden), 1)).float()

    @torch.no_grad()
    def inner(self, expert: int, hidden: torch.Tensor) -> torch.Tensor:
        """`(T, n)` float32: what the second projection of one expert reads."""
        return self.experts.gated(self.experts.experts[expert].first(hidden)).float()


def tokens_of(model: nn.Module, layers: Sequence[RoutedLayer], calibration: CalibrationSet) -> Iterator[RoutedTokens]:
    """The tokens that reach each layer of the original model, in forward order, by one forward of it in all."""
    by_name = {routed.block.name: routed for routed in layers}
    blocks = [routed.block for routed in layers]
    batches = [*calibration.fit, *calibration.held_out]
    stream = Stream(model, plan(model, blocks, calibration.probe), batches)
    for segment in stream.plan.segments:
        inside = [RoutedTokens(model, by_name[block.name], calibration) for block in segment.blocks]
        for index in range(len(batches)):
            stream.run(index, inputs=[(tokens.routed.layer, tokens.add) for tokens in inside])
        stream.step()
        while inside:
            yield inside.pop(0)


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
    columns = torch.arange(len(W), device=W.device)
    if shrinkage == "auto":
        if len(folds) < 2:
            return W
        shrinkage = cross_fit(folds, W, columns).shrinkage
    return reweight(combine(folds), W, columns, float(shrinkage)).V.float() if folds else W


class _Unrouted(TorchFunctionMode):
    """Logits of removed experts are minus infinity: results of linears that have one entry for each expert."""

    def __init__(self, removed: torch.Tensor) -> None:
        super().__init__()
        self.removed = removed
        self._active = False

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func not in _LINEAR or args[1].ndim != 2 or result.shape[-1] != len(self.removed):
            return result
        return result.masked_fill(self.removed.to(result.device), -torch.inf)

    def start(self, *_: Any) -> None:
        """Forward pre-hook of the layer."""
        self.__enter__()
        self._active = True

    def stop(self, *_: Any) -> None:
        """Forward pre-hook of the experts, and once more at the end: what runs in between may have failed."""
        if self._active:
            self.__exit__(None, None, None)
        self._active = False


@contextmanager
def unrouted(model: nn.Module, routed: RoutedLayer, kept: Sequence[int] | torch.Tensor) -> Iterator[None]:
    """Within the context, the router of a layer sends nothing to experts that are not in `kept`.

    The logits of the others are minus infinity, and so is what else there is one number of for each expert (a bias of
    the choice).
    """
    removed = torch.ones(routed.block.units, dtype=torch.bool)
    removed[torch.as_tensor(kept)] = False
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    vectors = [tensors[piece.tensor] for piece in routed.block.slices]
    vectors = [vector.view(-1) for vector in vectors if vector.numel() == routed.block.units]
    values = [vector.detach().clone() for vector in vectors]
    mode = _Unrouted(removed)
    handles = [
        model.get_submodule(routed.layer).register_forward_pre_hook(mode.start),
        model.get_submodule(routed.block.name).register_forward_pre_hook(mode.stop),
    ]
    with torch.no_grad():
        for vector in vectors:
            vector[removed.to(vector.device)] = -torch.inf
    try:
        yield
    finally:
        mode.stop()
        for handle in handles:
            handle.remove()
        with torch.no_grad():
            for vector, value in zip(vectors, values, strict=True):
                vector.copy_(value)
