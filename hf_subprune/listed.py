"""Experts that are modules of their own in a list, watched for as long as they are worked on.

Some mixtures of experts hold each expert as a module and call those that a token is sent to. While they are watched,
every forward calls every expert, on no rows if need be, and it is known which tokens the rows of an expert are.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import nn

_LISTS = (nn.ModuleDict, nn.ModuleList)


class Listed:
    """The forward of a list of experts while they are watched: its own, and calls of the experts that it left out.

    Attributes:
        every: Whether experts that no token is sent to run on all tokens, which count with weight 0.
        tokens: By name of an expert, `(rows,)` int64: which of the `of` tokens of the latest call were sent to it.
            Empty where what experts are given is no selection of tokens.
        of: Number of tokens in the latest call.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._own = partial(type(module).forward, module)
        self._held = module.__dict__.get("forward")  # accelerate's, which moves what is given to where it runs
        self.every = False
        self.tokens: dict[str, torch.Tensor] = {}
        self.of = 0

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        hidden, *routing = (*args, *kwargs.values())
        self.tokens, self.of = self._sent(hidden, routing), len(hidden)
        output = (self._held or self._own)(hidden, *routing)
        for name, tokens in self.tokens.items():
            if len(tokens) == 0:
                extra = self.module.get_submodule(name)(hidden if self.every else hidden[:0])
                if self.every:
                    output = output + 0 * extra
                    self.tokens[name] = torch.arange(len(hidden), device=hidden.device)
        return output

    @torch.no_grad()
    def _sent(self, hidden: torch.Tensor, routing: Sequence[Any]) -> dict[str, torch.Tensor]:
        """Which tokens each expert is given: what it gets when the tokens are their own numbers."""
        own = {name: self.module._modules[name] for name in _experts(self.module)}
        notes = {name: _Note() for name in own}
        numbers = torch.arange(len(hidden), dtype=torch.float32, device=hidden.device)
        self.module._modules.update(notes)
        try:
            self._own(numbers.unsqueeze(1).expand_as(hidden).clone(), *routing)
        finally:
            self.module._modules.update(own)
        given = {name: numbers[:0].unsqueeze(1) if note.rows is None else note.rows for name, note in notes.items()}
        if all(torch.isin(rows, numbers).all() and (rows == rows[:, :1]).all() for rows in given.values()):
            return {name: rows[:, 0].long() for name, rows in given.items()}
        return {}

    def attach(self) -> None:
        """Watch."""
        self.module.__dict__["forward"] = self

    def together(self) -> dict[str, nn.Parameter | None]:
        """The list holds no parameters."""
        return {}

    def detach(self, parameters: dict[str, nn.Parameter | None]) -> None:
        """Watch no longer; there are no `parameters`."""
        del self.module.__dict__["forward"]
        if self._held is not None:
            self.module.__dict__["forward"] = self._held


class _Note(nn.Module):
    """Notes what an expert is given."""

    rows: torch.Tensor | None = None

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        self.rows = rows
        return torch.zeros_like(rows)


def understood(module: nn.Module) -> Listed | None:
    """The list to be watched, if it calls alike modules on what it is told of tokens."""
    if not isinstance(module, _LISTS) or apart_in(module) is not None or "forward" not in vars(type(module)):
        return None
    self_hidden_routing_weights = 4
    experts = _experts(module)
    alike = len({type(module.get_submodule(name)) for name in experts}) == 1
    if len(experts) < 2 or not alike or len(signature(type(module).forward).parameters) < self_hidden_routing_weights:
        return None
    return Listed(module)


def _experts(module: nn.Module) -> list[str]:
    """Names of the modules in a list that hold parameters; dropout holds none."""
    return [name for name, child in module.named_children() if next(child.parameters(), None) is not None]


def apart_in(module: nn.Module) -> Listed | None:
    """What watches a list of experts, if it is watched now."""
    forward = module.__dict__.get("forward")
    return forward if isinstance(forward, Listed) else None
