"""Tokens that reach a mixture-of-experts layer, and how its router sends them on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from ..collection.planning import plan
from ..collection.stream import Stream
from ..data.batches import Samples
from ..models.experts import StackedExperts
from ..surgery.edits import shrink
from .layers import RoutedLayer


class RoutedTokens:
    """The tokens that reach one layer, and how its router sends them on to any part of its experts.

    Args:
        routed: The layer.
        samples: What the tokens come from, and the model, whole, its experts stacked.
    """

    def __init__(self, routed: RoutedLayer, samples: Samples) -> None:
        self.model, self.routed, self.samples = samples.model, routed, samples
        experts = StackedExperts.understood(self.model.get_submodule(routed.block.name))
        assert experts is not None  # or else it would not be a routed layer
        experts.every = True
        self.experts = experts
        self._batches: list[torch.Tensor] = []
        router = [piece for piece in routed.block.slices if not piece.tensor.startswith(f"{routed.block.name}.")]
        self._router = replace(routed.block, slices=tuple(router))

    def add(self, inputs: torch.Tensor) -> None:
        """What the layer is called with; batches come in the order of the calibration."""
        self._batches.append(self.samples.rows(inputs, len(self._batches), self.routed.layer))

    @property
    def fit(self) -> list[torch.Tensor]:
        """`(T, d)` real tokens of each batch to fit on."""
        return self._batches[: len(self.samples.fit)]

    @property
    def held_out(self) -> list[torch.Tensor]:
        """The same of the held-out batches."""
        return self._batches[len(self.samples.fit) :]

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


def tokens_of(layers: Sequence[RoutedLayer], samples: Samples) -> Iterator[RoutedTokens]:
    """The tokens that reach each layer of the original model, in forward order, by one forward of it in all."""
    by_name = {routed.block.name: routed for routed in layers}
    blocks = [routed.block for routed in layers]
    stream = Stream(samples, plan(samples, blocks))
    for segment in stream.plan.segments:
        inside = [RoutedTokens(by_name[block.name], samples) for block in segment.blocks]
        for index in range(len(stream.batches)):
            stream.run(index, inputs=[(tokens.routed.layer, tokens.add) for tokens in inside])
        stream.step()
        while inside:
            yield inside.pop(0)
