"""Mixture-of-experts layers whose whole experts can be removed, and the proof that it is exact."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..blocks import Attribute, Block, Refusal, Slice, parameters_per_unit
from ..models.experts import StackedExperts
from ..models.running import call, hooked
from ..surgery.verification import EquivalenceError, verify

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


def routed_layers(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[list[RoutedLayer], list[Refusal]]:
    """The layers of which whole experts can be taken, found by their parameters and one forward.

    The rows of a router are those tensors of the module that routes, and of its children, that have one entry for
    each expert. Whether that is all that there is to it, `verification.verify` says.
    """
    found: list[RoutedLayer] = []
    refusals = []
    for path, module in model.named_modules():
        experts = StackedExperts.understood(module)
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
        masking=lambda _, block, kept: unrouted(model, by_name[block.name], kept),
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

    def note(path: str) -> Callable[[Any, Any], None]:
        return lambda args, kwargs: seen[path].extend(
            value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)
        )

    with hooked(model, arguments=[(path, note(path)) for path in paths]):
        call(model, dict(inputs))
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
        parameters_per_unit=parameters_per_unit(parameters, slices),
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
