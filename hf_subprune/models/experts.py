"""Experts that a model stacks in one tensor, taken apart into ordinary linears for as long as they are worked on.

Mixture-of-experts layers hold one projection of all experts in one parameter, `(experts, m, n)`, which fused kernels
read. Taken apart, each expert is a module with two linears whose weights are views of its part of the parameter: it is
found, verified and shrunk like any other MLP. Put together again, all experts of a layer have one width, each with
neurons of its own choice.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise, product
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..blocks import Block
from ..runs.memory import is_of_the_machine
from .listed import ListedExperts
from .paths import ancestors_of
from .weights import APART, parameter_like

if TYPE_CHECKING:
    from typing import Self  # of Python 3.11

FIRST, SECOND = ("gate_up_proj", "up_proj"), "down_proj"
"""Parameters of the first (one of two) and second projection, as the experts interface of Transformers names them."""


class Expert(nn.Module):
    """One expert: its two projections as linears, named after the parameters that they are a part of.

    Attributes:
        tokens: `(rows,)` int64, which of the `of` tokens of the layer the rows of the latest call are.
        of: Number of tokens in the latest call of the layer.
    """

    def __init__(self, projections: dict[str, tuple[nn.Parameter, nn.Parameter | None]]) -> None:
        super().__init__()
        for name, (weight, bias) in projections.items():
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            linear.weight, linear.bias = weight, bias  # type: ignore[assignment]
            self.add_module(name, linear)
        self.tokens, self.of = torch.empty(0, dtype=torch.long), 0

    @property
    def first(self) -> nn.Linear:
        """The projection to the neurons, and to their gates where it has any."""
        return next(self.children())  # type: ignore[return-value]

    @property
    def second(self) -> nn.Linear:
        """The projection that reads the neurons."""
        return self.get_submodule(SECOND)  # type: ignore[return-value]


@dataclass(frozen=True)
class _Form:
    """How a module of experts computes.

    Args:
        first: Name of the first projection.
        transposed: Whether weights are stored as `(experts, inputs, outputs)`.
        routed: Whether it is told which tokens each expert gets, and with which weights; if not, its tokens come
            expert by expert, as many for each.
    """

    first: str
    transposed: bool
    routed: bool


class StackedExperts:
    """The forward of a module of experts while they are taken apart; it holds what puts them together again (`Form`).

    Attributes:
        every: Whether every expert runs on all tokens; those that the router did not send it count with weight 0.
    """

    def __init__(self, module: nn.Module, form: _Form) -> None:
        self.module, self.form = module, form
        self.stacked = dict(module._parameters)
        self.every = False
        self.experts = [self._expert(index) for index in range(len(self._stack(SECOND)))]
        self.views = [parameter for expert in self.experts for parameter in expert.parameters()]
        self.normed = getattr(module, "has_post_expert_norm", False)

    @classmethod
    def understood(cls, module: nn.Module) -> Self | None:
        """The experts of a module, if it computes what they do."""
        ranks = {name: parameter.ndim for name, parameter in module._parameters.items() if parameter is not None}
        if "forward" in module.__dict__ or ranks.get(SECOND) != 3:
            return None
        for first, routed, transposed in product(FIRST, (True, False), (False, True)):
            if ranks.get(first) == 3:
                experts = cls(module, _Form(first, transposed, routed))
                if _computes_the_same(module, experts):
                    return experts
        return None

    def _stack(self, name: str) -> nn.Parameter:
        parameter = self.stacked[name]
        assert parameter is not None
        return parameter

    def _expert(self, index: int) -> Expert:
        def view(name: str, transposed: bool) -> nn.Parameter | None:
            stack = self.stacked.get(name)
            if stack is None:
                return None
            part = stack.detach()[index]
            return nn.Parameter(part.T if transposed else part, requires_grad=stack.requires_grad)

        names = (self.form.first, SECOND)
        return Expert({name: (view(name, self.form.transposed), view(f"{name}_bias", False)) for name in names})  # type: ignore[misc]

    def __call__(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        hidden, *routing = (*args, *kwargs.values())
        return self._routed(hidden, *routing) if self.form.routed else self._in_turn(hidden)

    def _routed(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        output = torch.zeros_like(hidden)
        for number, expert in enumerate(self.experts):
            sent = index == number
            share = (weights * sent).sum(-1, keepdim=True)
            expert.of = len(hidden)
            expert.tokens = (sent.any(-1) | self.every).nonzero().flatten()
            part = self.run(expert, hidden[expert.tokens], share[expert.tokens])
            output.index_add_(0, expert.tokens, part.to(output.dtype))
        return output

    def _in_turn(self, hidden: torch.Tensor) -> torch.Tensor:
        outputs = []
        for expert, rows in zip(self.experts, hidden.view(len(self.experts), -1, hidden.shape[-1]), strict=True):
            expert.of = len(rows)
            # Tokens of other experts come as zeros.
            expert.tokens = (rows.any(-1) | self.every).nonzero().flatten()
            part = self.run(expert, rows[expert.tokens])
            outputs.append(torch.zeros_like(rows).index_add(0, expert.tokens, part))
        return torch.cat(outputs)

    def run(self, expert: Expert, rows: torch.Tensor, share: torch.Tensor | None = None) -> torch.Tensor:
        inner = self.gated(expert.first(rows))
        if share is None:
            return expert.second(inner)
        if expert.second.bias is None and not self.normed and not self.every:
            # In front of the linear, so that the moments of its input weigh each row as the layer's output does.
            return expert.second((inner * share).to(inner.dtype))
        part = expert.second(inner)
        if self.normed:
            part = self.module.post_expert_norm(part)  # type: ignore[operator]
        return (part.masked_fill(share == 0, 0) if self.every else part) * share  # of no weight, even if it overflows

    def gated(self, inner: torch.Tensor) -> torch.Tensor:
        module: Any = self.module
        if self.form.first != FIRST[0]:
            return module.act_fn(inner)
        if hasattr(module, "_apply_gate"):
            return module._apply_gate(inner)
        gate, up = inner.chunk(2, dim=-1)
        return module.act_fn(gate) * up

    def attach(self) -> None:
        """Put the experts in the place of the stacked parameters."""
        for name in self._replaced():
            del self.module._parameters[name]
        for number, expert in enumerate(self.experts):
            self.module.add_module(str(number), expert)
        self.module.__dict__["forward"] = self

    def together(self) -> dict[str, nn.Parameter | None]:
        """All parameters of the module with the present values of the experts; the old ones if none was shrunk.

        Raises:
            ValueError: the experts have different widths.
        """
        parameters = dict(self.stacked)
        present = [parameter for expert in self.experts for parameter in expert.parameters()]
        if any(now is not view for now, view in zip(present, self.views, strict=True)):
            parameters |= {name: parameter_like(self._stack(name), self._restacked(name)) for name in self._replaced()}
        return parameters

    def detach(self, parameters: dict[str, nn.Parameter | None]) -> None:
        """Put `parameters` in the place of the experts."""
        for number in range(len(self.experts)):
            del self.module._modules[str(number)]
        del self.module.__dict__["forward"]
        self.module._parameters.clear()
        self.module._parameters.update(parameters)

    def _replaced(self) -> list[str]:
        wanted = [f"{name}{kind}" for name in (self.form.first, SECOND) for kind in ("", "_bias")]
        return [name for name in wanted if self.stacked.get(name) is not None]

    def _restacked(self, name: str) -> torch.Tensor:
        projection, bias = name.removesuffix("_bias"), name.endswith("_bias")
        linears = [expert.get_submodule(projection) for expert in self.experts]
        parts: list[Any] = [(linear.bias if bias else linear.weight) for linear in linears]
        if len({part.shape for part in parts}) > 1:
            widths = [expert.second.in_features for expert in self.experts]
            raise ValueError(f"Experts that are stored in one tensor must keep equally many units, found {widths}.")
        return torch.stack([part.detach().T if self.form.transposed and not bias else part.detach() for part in parts])


def stack_of(modules: Mapping[str, nn.Module], path: str) -> str | None:
    """Dotted path of the module that stacks the expert that a linear is part of, if one does.

    Args:
        modules: Of a model that is apart: by dotted path, those at least that `path` lies in. So for the others.
        path: Of the linear.
    """
    stack, name = _parent(_parent(path)), _parent(path)
    return stack if stack and isinstance(modules[name], Expert) else None


def routed_tokens(modules: Mapping[str, nn.Module], path: str) -> tuple[str, torch.Tensor, int] | None:
    """Of a linear in an expert: where its stack or list is, and which of how many tokens reached the expert last."""
    stack = stack_of(modules, path)
    if stack is not None:
        expert: Any = modules[_parent(path)]
        return stack, expert.tokens, expert.of
    found = _in_list(modules, path)
    if found is None or found[1] not in found[2].tokens:
        return None
    around, name, held = found
    return around, held.tokens[name], held.of


def by_layer(modules: Mapping[str, nn.Module], blocks: Iterable[Block]) -> list[list[Block]]:
    """Like blocks of experts that share the tokens of a layer, together; any other is alone. In order of the first."""
    together: dict[Any, list[Block]] = {}
    for block in blocks:
        found = _in_list(modules, block.consumer)
        inside = found and (found[0], block.consumer.removeprefix(f"{found[0]}.{found[1]}."))
        together.setdefault(inside or block.stack or block, []).append(block)
    return list(together.values())


def is_expert(modules: Mapping[str, nn.Module], path: str) -> bool:
    """Whether a linear is in an expert, which sees some of the tokens."""
    return stack_of(modules, path) is not None or _in_list(modules, path) is not None


def _in_list(modules: Mapping[str, nn.Module], path: str) -> tuple[str, str, ListedExperts] | None:
    """Where the list of experts is that a linear is in, the expert's name there, and what watches the list."""
    for around, name in pairwise(ancestors_of(path)):
        held = vars(modules[around]).get(APART)
        if isinstance(held, ListedExperts):
            return around, name.removeprefix(f"{around}."), held
    return None


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


@torch.no_grad()
def _computes_the_same(module: nn.Module, apart: StackedExperts) -> bool:
    """Whether the module and its experts agree on random tokens of which each expert gets some."""
    experts, training = len(apart.experts), module.training
    weight = apart.experts[0].first.weight
    random = torch.Generator().manual_seed(0)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=random).to(weight)

    arguments = [uniform(2 * experts, weight.shape[1]) - 0.5]
    if apart.form.routed:
        index = torch.arange(2 * experts, device=weight.device)
        arguments += [torch.stack([index % experts, (index + 1) % experts], 1), uniform(2 * experts, 2)]
    module.eval()
    try:
        expected, found = module(*arguments), apart(*arguments)
    except Exception as error:  # whatever a forward raises that takes other arguments
        if is_of_the_machine(error):
            raise
        return False
    finally:
        module.train(training)
    if not isinstance(expected, torch.Tensor) or expected.shape != found.shape:
        return False
    close = torch.finfo(expected.dtype).eps ** 0.5 * expected.abs().max()
    return bool((expected - found).abs().max() <= close)
