"""`nn.MultiheadAttention` with its input projections as linears of their own, for as long as they are worked on.

They are stacked in one tensor, and the output projection is a linear that is never called. Taken apart, the
projections of queries, keys and values are linears whose weights are views of their parts of that tensor, and all are
called, so that heads are found and shrunk like those of any other attention. Put together again, the tensor has fewer
rows, and the forward stays the one that does not need as many as its input has features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .forwards import CUT_ARGUMENTS, INNER_WIDTH, adapted
from .weights import parameter_like

PROJECTIONS = ("q_proj", "k_proj", "v_proj")
WEIGHT, BIAS = "in_proj_weight", "in_proj_bias"
APART = "apart"
"""Attribute of a module that is apart now: its `ApartAttention`."""


class ApartAttention:
    """What a `nn.MultiheadAttention` is made of while it is apart, and what puts it together again."""

    def __init__(self, module: nn.MultiheadAttention) -> None:
        self.module = module
        self.stacked = {name: module._parameters[name] for name in (WEIGHT, BIAS)}
        weights, biases = self._views(WEIGHT), self._views(BIAS)
        self.linears = dict(zip(PROJECTIONS, map(_linear, weights, biases), strict=True))
        self.views = [parameter for linear in self.linears.values() for parameter in linear.parameters()]
        self._entries = adapted(module, None, vars(module).get(CUT_ARGUMENTS, {}))

    def _views(self, name: str) -> list[Any]:
        stack = self.stacked[name]
        if stack is None:
            return [None] * len(PROJECTIONS)
        return [nn.Parameter(part, requires_grad=stack.requires_grad) for part in stack.detach().chunk(3)]

    def attach(self) -> None:
        """Put the three linears in the place of the stacked parameters."""
        self.module._parameters.update(dict.fromkeys(self.stacked))
        for name, linear in self.linears.items():
            self.module.add_module(name, linear)
        vars(self.module).pop(INNER_WIDTH, None)
        vars(self.module).update(self._entries)
        vars(self.module)[APART] = self

    def together(self) -> dict[str, nn.Parameter | None]:
        """The stacked parameters with the present values of the linears; the old ones if no head was removed."""
        linears: list[Any] = list(self.linears.values())
        present = [parameter for linear in linears for parameter in linear.parameters()]
        if all(now is view for now, view in zip(present, self.views, strict=True)):
            return dict(self.stacked)
        parts = {WEIGHT: [linear.weight for linear in linears], BIAS: [linear.bias for linear in linears]}
        return {
            name: None if stack is None else parameter_like(stack, torch.cat([part.detach() for part in parts[name]]))
            for name, stack in self.stacked.items()
        }

    def detach(self, parameters: dict[str, nn.Parameter | None]) -> None:
        """Put `parameters` in the place of the linears."""
        entries = vars(self.module)
        for name in self.linears:
            del self.module._modules[name]
        self.module._parameters.update(parameters)
        del entries[APART]
        self._entries = {name: entries.pop(name) for name in ("forward", CUT_ARGUMENTS) if name in entries}
        width = self.module.in_proj_weight.shape[0] // 3
        if width < self.module.embed_dim:
            entries.update(adapted(self.module, width, self._entries.get(CUT_ARGUMENTS, {})))


def understood(module: nn.Module) -> ApartAttention | None:
    """The module taken apart, if it is a `nn.MultiheadAttention` with stacked projections and nothing beside them."""
    if type(module).forward is not nn.MultiheadAttention.forward:
        return None
    replaced = "forward" in vars(module) and INNER_WIDTH not in vars(module)  # apart already, or by a device map
    if replaced or "_old_forward" in vars(module) or module._parameters[WEIGHT] is None:
        return None
    return ApartAttention(module) if module.bias_k is None and not module.add_zero_attn else None


def apart_in(module: nn.Module) -> ApartAttention | None:
    """What a `nn.MultiheadAttention` is made of, if it is apart now."""
    return vars(module).get(APART)


def _linear(weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight, linear.bias = weight, bias  # type: ignore[assignment]
    return linear
