"""Experts that are modules of their own in a list, watched for as long as they are worked on.

Some mixtures of experts hold each expert as a module and call those that a token is sent to. While they are watched,
every forward calls every expert, on no rows if need be, and it is known which tokens the rows of an expert are.
"""

from __future__ import annotations

from functools import partial
from inspect import BoundArguments, signature
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..runs.memory import is_of_the_machine

if TYPE_CHECKING:
    from typing import Self  # of Python 3.11

_LISTS = (nn.ModuleDict, nn.ModuleList)


class ListedExperts:
    """The forward of a list of experts while they are watched (`Form`): its own, and calls of those that it left out.

    Attributes:
        every: Whether experts that no token is sent to run on all tokens, which count with weight 0.
        tokens: By name of an expert, `(rows,)` int64: which of the `of` tokens of the latest call its rows are, in
            their order; a token may be there twice. Empty where what experts are given is no selection of tokens.
        of: Number of tokens in the latest call.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._own = partial(type(module).forward, module)
        self._signature = signature(self._own)
        self._held = module.__dict__.get("forward")  # accelerate's, which moves what is given to where it runs
        self.every = False
        self.tokens: dict[str, torch.Tensor] = {}
        self.of = 0

    @classmethod
    def understood(cls, module: nn.Module) -> Self | None:
        """The list to be watched, if it calls alike modules on what it is told of tokens."""
        if not isinstance(module, _LISTS) or "forward" not in vars(type(module)):
            return None
        self_hidden_routing_weights = 4
        experts = _experts(module)
        alike = len({type(module.get_submodule(name)) for name in experts}) == 1
        takes = len(signature(type(module).forward).parameters)
        return cls(module) if len(experts) > 1 and alike and takes >= self_hidden_routing_weights else None

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        given = self._signature.bind(*args, **kwargs)
        first = next(iter(given.arguments))
        hidden = given.arguments[first]
        self.tokens, self.of = {}, len(hidden)
        if hidden.ndim == 2:
            numbers = torch.arange(len(hidden), dtype=torch.float32, device=hidden.device)
            given.arguments[first] = numbers.unsqueeze(1).expand_as(hidden).clone()
            self.tokens = self._sent(given, numbers)
        output = (self._held or self._own)(*args, **kwargs)
        for name in [name for name, tokens in self.tokens.items() if len(tokens) == 0]:
            if self.every:
                self.tokens[name] = torch.arange(len(hidden), device=hidden.device)
            extra = self.module.get_submodule(name)(hidden[self.tokens[name]])
            if self.every:
                output = output + 0 * extra.nan_to_num()
        return output

    @torch.no_grad()
    def _sent(self, given: BoundArguments, numbers: torch.Tensor) -> dict[str, torch.Tensor]:
        """Which tokens each expert gets when those `given` are their own numbers; empty if it gets something else."""
        own = {name: self.module._modules[name] for name in _experts(self.module)}
        notes = {name: _Note() for name in own}
        self.module._modules.update(notes)
        try:
            self._own(*given.args, **given.kwargs)
        except Exception as error:
            if is_of_the_machine(error):
                raise
            return {}  # it does with its experts what is not followed here
        finally:
            self.module._modules.update(own)
        tokens = {}
        for name, note in notes.items():
            rows = numbers[:0, None] if note.rows is None else note.rows
            if rows.ndim != 2 or not (rows == rows[:, :1]).all() or not torch.isin(rows[:, 0], numbers).all():
                return {}
            tokens[name] = rows[:, 0].long()
        return tokens

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
        return torch.full_like(rows, torch.nan)  # no number of a token, if another module reads it


def _experts(module: nn.Module) -> list[str]:
    """Names of the modules in a list that hold parameters; dropout holds none."""
    modules = module._modules.items()  # children that have two names have tokens under each
    return [name for name, child in modules if child is not None and next(child.parameters(), None) is not None]
