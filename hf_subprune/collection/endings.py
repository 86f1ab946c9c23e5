"""What a part of a segment puts out once a block in it has changed, without running it again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from ..blocks import Block
from ..models.linears import is_linear, matrix_shape
from ..models.paths import ancestors_of, is_inside
from .additions import Addition
from .segments import Segment

# Bytes of a consumer's inputs that are held for the batches of a segment; on those beyond that, it runs again.
_HELD_BYTES = 400 * 2**20


class _Held:
    """What a consumer read, batch by batch, and will read of it when columns are gone."""

    def __init__(self, consumer: nn.Module) -> None:
        self._consumer: Any = consumer
        self._inputs: dict[int, torch.Tensor] = {}
        self._bytes = 0

    def knows(self, index: int, columns: torch.Tensor) -> bool:
        """Whether a batch is held, and the consumer reads as many columns of it as it is now."""
        reads, _ = matrix_shape(self._consumer)
        return index in self._inputs and 0 < len(columns) == reads

    def _hold(self, index: int, inputs: torch.Tensor) -> bool:
        size = inputs.numel() * inputs.element_size()
        if self._bytes + size > _HELD_BYTES:
            return False
        self._inputs[index] = inputs
        self._bytes += size
        return True

    def _new(self, index: int, columns: torch.Tensor) -> torch.Tensor:
        inputs = self._inputs[index]
        with torch.no_grad():
            return self._consumer(inputs[..., columns.to(inputs.device)])


class Ending(_Held):
    """Outputs of a segment that are `gain * consumer(x) + rest`, batch by batch: `x` and the rest stay as they are.

    Args:
        consumer: Of the segment's last block.
        addition: Where its output is added to the rest.
    """

    def __init__(self, consumer: nn.Module, addition: Addition) -> None:
        super().__init__(consumer)
        self._addition = addition
        self._rests: dict[int, tuple[torch.Tensor, TreeSpec]] = {}

    @classmethod
    def of(cls, consumer: Any, addition: Addition | None, segment: str, calls: int) -> Ending | None:
        """That of a segment, if its output is the sum that the consumer's goes into; `None` otherwise."""
        ends = addition is not None and addition.path == segment and not addition.is_input
        return cls(consumer, addition) if ends and calls == 1 and _is_plain(consumer) else None  # type: ignore[arg-type]

    def hold(self, index: int, inputs: torch.Tensor, output: torch.Tensor, values: Any) -> None:
        """Keep what is left of a batch once the consumer has changed, if there is room for it.

        Args:
            index: Of the batch.
            inputs: Of the consumer.
            output: Of the consumer.
            values: The segment's output.
        """
        leaves, structure = tree_flatten(values)
        if len(leaves) != 1 or leaves[0].shape != output.shape or not self._hold(index, inputs):
            return
        (total,) = leaves
        rest = total.float() - self._addition.gain.to(total.device).float() * output.float()
        self._rests[index] = rest.to(total.dtype), structure

    def output(self, index: int, columns: torch.Tensor) -> Any:
        """Of the segment on a batch, which is held no longer.

        Args:
            index: Of the batch.
            columns: `(k,)` int64, those of the consumer's inputs that are left.
        """
        new = self._new(index, columns)
        del self._inputs[index]
        rest, structure = self._rests.pop(index)
        total = rest + self._addition.gain.to(new) * new
        return tree_unflatten([total], structure)


class Shell(_Held):
    """Outputs of the outermost module around a consumer that puts out what this does and no other tensor: attention.

    While blocks behind it in the segment are observed, nothing in it runs but the consumer.

    Args:
        consumer: Of a block.
        paths: Of modules around it, inwards, that no other block of the segment lies in.
    """

    def __init__(self, consumer: nn.Module, paths: Sequence[str]) -> None:
        super().__init__(consumer)
        self._paths = paths
        self._output: torch.Tensor | None = None  # of the consumer, until its batch is held
        self._found: tuple[str, Callable[[torch.Tensor], Any]] | None = None
        self._outputs: dict[int, tuple[str, Callable[[torch.Tensor], Any]]] = {}

    @classmethod
    def of(cls, consumer: Any, block: Block, segment: Segment, calls: int) -> Shell | None:
        """That of a block of a segment; `None` where there can be none."""
        inside = [path for path in ancestors_of(block.consumer)[:-1] if is_inside(path, segment.path)]
        others = [other for other in segment.blocks if other is not block]
        alone = [path for path in inside if not any(is_inside(other.consumer, path) for other in others)]
        return cls(consumer, alone) if alone and calls == 1 and _is_plain(consumer) else None

    def hooks(self) -> list[tuple[str, Callable[[Any], None]]]:
        """What to call with outputs of which modules."""
        return [(path, partial(self._look, path)) for path in self._paths]

    def begin(self, output: torch.Tensor) -> None:
        """The consumer has put this out."""
        self._output, self._found = output, None

    def hold(self, index: int, inputs: torch.Tensor) -> None:
        """Keep what the consumer read of the batch that it was called with last, if there is room for it."""
        if self._found is not None and self._hold(index, inputs):
            self._outputs[index] = self._found
        self._output = self._found = None

    def outputs(self, index: int, columns: torch.Tensor) -> dict[str, Callable[[], Any]]:
        """By its path, makes what the module puts out on a batch; nothing where that is not known.

        Args:
            index: Of the batch.
            columns: `(k,)` int64, those of the consumer's inputs that are left.
        """
        if not self.knows(index, columns):
            return {}
        path, around = self._outputs[index]
        return {path: lambda: around(self._new(index, columns))}

    def _look(self, path: str, values: Any) -> None:
        leaves, structure = tree_flatten(values)
        tensors = [place for place, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        if len(tensors) != 1 or leaves[tensors[0]] is not self._output:
            return
        before, after = leaves[: tensors[0]], leaves[tensors[0] + 1 :]
        self._found = path, lambda new: tree_unflatten([*before, new, *after], structure)


def _is_plain(consumer: Any) -> bool:
    """Whether a consumer reads columns: no convolution over places."""
    return is_linear(consumer) and consumer.weight.ndim == 2
