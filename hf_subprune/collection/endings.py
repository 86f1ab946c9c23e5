"""What a segment puts out once its last block has changed, from what that block added: without running it again."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from ..models.linears import is_linear, matrix_shape
from .additions import Addition

# Bytes of a consumer's inputs that are held for the batches of a segment; on those beyond that, it runs again.
_HELD_BYTES = 400 * 2**20


class Ending:
    """Outputs of a segment that are `gain * consumer(x) + rest`, batch by batch: `x` and the rest stay as they are.

    Args:
        consumer: Of the segment's last block.
        addition: Where its output is added to the rest.
    """

    def __init__(self, consumer: nn.Module, addition: Addition) -> None:
        self._consumer: Any = consumer
        self._addition, self._bytes = addition, 0
        self._held: dict[int, tuple[torch.Tensor, torch.Tensor, TreeSpec]] = {}

    @classmethod
    def of(cls, consumer: Any, addition: Addition | None, segment: str, calls: int) -> Ending | None:
        """That of a segment, if its output is the sum that the consumer's goes into; `None` otherwise."""
        ends = addition is not None and addition.path == segment and not addition.is_input
        plain = is_linear(consumer) and consumer.weight.ndim == 2
        return cls(consumer, addition) if ends and plain and calls == 1 else None  # type: ignore[arg-type]

    def hold(self, index: int, inputs: torch.Tensor, output: torch.Tensor, values: Any) -> None:
        """Keep what is left of a batch once the consumer has changed, if there is room for it.

        Args:
            index: Of the batch.
            inputs: Of the consumer.
            output: Of the consumer.
            values: The segment's output.
        """
        leaves, structure = tree_flatten(values)
        size = inputs.numel() * inputs.element_size()
        if len(leaves) != 1 or leaves[0].shape != output.shape or self._bytes + size > _HELD_BYTES:
            return
        (total,) = leaves
        rest = total.float() - self._addition.gain.to(total.device).float() * output.float()
        self._held[index] = inputs, rest.to(total.dtype), structure
        self._bytes += size

    def knows(self, index: int, columns: int) -> bool:
        """Whether a batch is held, and the consumer reads so many columns of it as it is now."""
        reads, _ = matrix_shape(self._consumer)
        return index in self._held and 0 < columns == reads

    def output(self, index: int, columns: torch.Tensor) -> Any:
        """Of the segment on a batch, which is held no longer.

        Args:
            index: Of the batch.
            columns: `(k,)` int64, those of the consumer's inputs that are left.
        """
        inputs, rest, structure = self._held.pop(index)
        with torch.no_grad():
            new = self._consumer(inputs[..., columns.to(inputs.device)])
        total = rest + self._addition.gain.to(new) * new
        return tree_unflatten([total], structure)
