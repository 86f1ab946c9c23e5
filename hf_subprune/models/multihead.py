"""`nn.MultiheadAttention` with its input projections as linears of their own, for as long as they are worked on.

They are stacked in one tensor, and the output projection is a linear that is never called. Taken apart, the
projections of queries, keys and values are linears whose weights are views of their parts of that tensor, and all are
called, so that heads are found and shrunk like those of any other attention. Put together again, the tensor has fewer
rows, and the forward stays the one that does not need as many as its input has features.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .forwards import CUT_ARGUMENTS, INNER_WIDTH, adapted
from .weights import parameter_like

if TYPE_CHECKING:
    from typing import Self  # of Python 3.11

PROJECTIONS = ("q_proj", "k_proj", "v_proj")
WEIGHT, BIAS = "in_proj_weight", "in_proj_bias"


class StackedAttention:
    """What a `nn.MultiheadAttention` is made of while it is apart, and what puts it together again (`Form`)."""

    every = False  # all of its linears run on everything

    def __init__(self, module: nn.MultiheadAttention) -> None:
        self.module = module
        self.stacked = {name: module._parameters[name] for name in (WEIGHT, BIAS)}
        weights, biases = self._views(WEIGHT), self._views(BIAS)
        self.linears = dict(zip(PROJECTIONS, map(_linear, weights, biases), strict=True))
        self.views = [parameter for linear in self.linears.values() for parameter in linear.parameters()]
        self._entries = adapted(module, None, vars(module).get(CUT_ARGUMENTS, {}))

    @classmethod
    def understood(cls, module: nn.Module) -> Self | None:
        """A `nn.MultiheadAttention` with stacked projections and nothing beside them."""
        if not isinstance(module, nn.MultiheadAttention) or type(module).forward is not nn.MultiheadAttention.forward:
            return None
        replaced = "forward" in vars(module) and INNER_WIDTH not in vars(module)  # by a device map
        if replaced or "_old_forward" in vars(module) or module._parameters[WEIGHT] is None:
            return None
        return cls(module) if module.bias_k is None and not module.add_zero_attn else None

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
        self._entries = {name: entries.pop(name) for name in ("forward", CUT_ARGUMENTS) if name in entries}
        width = self.module.in_proj_weight.shape[0] // 3
        if width < self.module.embed_dim:
            entries.update(adapted(self.module, width, self._entries.get(CUT_ARGUMENTS, {})))


def _linear(weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight, linear.bias = weight, bias  # type: ignore[assignment]
    return linear
