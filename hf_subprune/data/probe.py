"""Two samples that show what depends on what: real ones, made longer where they are too short to tell."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from ..models.running import Batch
from ..models.sizes import Sizes
from .features import most_positions, text_config

# Tokens of a text that are enough to see what depends on what, and the fewest: among one or two, attention has little
# or no choice, and distances do not differ.
MOST_TOKENS = 16
_FEWEST_TOKENS = 8
# Values of a sample that is no text: a second of sound, a small image.
_VALUES = 16_000


def probe_of(model: PreTrainedModel, batches: Sequence[Batch]) -> Batch:
    """Two samples of one batch, the first in which both have enough different tokens, or else the most.

    Texts lose their padding, and what is between their beginning and their last token beyond 16 tokens; other tensors
    with one entry a token follow. Texts of fewer than 8 different tokens get random ones behind their first. A batch
    that cannot be cut into samples is taken as it is.

    Args:
        model: Whose forward takes the batches.
        batches: To choose from; at least one.
    """
    batch = max(batches, key=_extent)
    if not is_divisible(batch):
        return batch
    longest = _lengths(batch).argsort(descending=True, stable=True)[:2].sort().values
    probe = {name: value[longest] for name, value in batch.items()}
    for side in _sides(probe):
        probe |= side.of_good_length(model)
    return probe


def samples_in(batch: Batch) -> int:
    """Number of samples: other tensors may hold several rows a sample, such as patches, or one for all samples."""
    rows = {len(value) for value in batch.values() if isinstance(value, torch.Tensor) and value.ndim}
    return min(rows - {1}, default=1)


def is_divisible(batch: Batch) -> bool:
    """Whether the batch can be cut into samples: every tensor has one first dimension."""
    return all(
        isinstance(value, torch.Tensor) and value.ndim and len(value) == samples_in(batch) for value in batch.values()
    )


@dataclass(frozen=True)
class _Side:
    """The arguments of one side of a model that takes token ids: its encoder's (or its own), or its decoder's.

    Args:
        prefix: Of their names.
        given: All of them.
    """

    prefix: str
    given: dict[str, Any]

    @property
    def ids(self) -> torch.Tensor:
        """`(samples, length)`, or `(samples, choices, length)`; codecs have a further dimension."""
        return self.given[f"{self.prefix}input_ids"]

    @property
    def real(self) -> torch.Tensor:
        """Which tokens are no padding: `(samples, length)` bool, or `(samples, choices, length)`."""
        mask = self.given.get(f"{self.prefix}attention_mask")
        if isinstance(mask, torch.Tensor) and mask.shape == self.ids.shape[: mask.ndim]:
            return mask.bool()
        return torch.ones_like(self.ids, dtype=torch.bool)

    @property
    def distinct(self) -> torch.Tensor:
        """`(samples,)`: how many different real tokens each has, in the choice that has fewest."""
        rows = zip(self.ids.flatten(0, self.real.ndim - 2), self.real.flatten(0, -2), strict=True)
        counts = torch.tensor([len(ids[real].unique(dim=0)) for ids, real in rows])
        return counts.view(len(self.ids), -1).amin(1)

    def of_good_length(self, model: PreTrainedModel) -> dict[str, torch.Tensor]:
        """What has one entry a token, cut or filled up."""
        real = self.real
        shape, fewest = real.shape, int(real.sum(-1).min())
        mask = self.given.get(f"{self.prefix}attention_mask")
        if mask is not None and mask.shape != shape:
            return {}  # it says of every token which others it attends to
        some = {k: v.flatten(0, real.ndim - 2) for k, v in self.given.items() if v.shape[: real.ndim] == shape}
        if fewest and len(some) == len(self.given):  # nothing else speaks of single tokens, such as those of an image
            places = [row.nonzero().flatten() for row in real.flatten(0, -2)]
            length = min(fewest, MOST_TOKENS) - 1
            kept = torch.stack([torch.cat([place[:length], place[-1:]]) for place in places])
            some = {name: value[torch.arange(len(kept))[:, None], kept] for name, value in some.items()}
        lacking = _FEWEST_TOKENS - int(self.distinct.min())
        if (limit := most_positions(model)) is not None:
            lacking = min(lacking, limit - some[f"{self.prefix}input_ids"].shape[1])
        if lacking > 0:
            some = {name: self._longer(name, value, lacking, model) for name, value in some.items()}
        return {name: value.unflatten(0, shape[:-1]) for name, value in some.items()}

    def _longer(self, name: str, value: torch.Tensor, lacking: int, model: PreTrainedModel) -> torch.Tensor:
        more = value[:, :1].expand(-1, lacking, *value.shape[2:])
        if name == f"{self.prefix}input_ids":
            config = model.config.get_text_config(decoder=True) if self.prefix else text_config(model.config)
            more = Sizes(model.config).tokens(more.shape, getattr(config, "vocab_size", None) or 100)
        elif name == f"{self.prefix}attention_mask":
            more = torch.ones_like(more)
        return torch.cat([value[:, :1], more.to(value), value[:, 1:]], 1)


def _sides(batch: Batch) -> list[_Side]:
    sides = [
        _Side(prefix, {k: v for k, v in batch.items() if k.startswith("decoder_") == bool(prefix)})
        for prefix in ("", "decoder_")
    ]
    return [side for side in sides if f"{side.prefix}input_ids" in side.given and side.ids.ndim > 1]


def _extent(batch: Batch) -> int:
    """How much there is of the second longest sample, up to what is enough."""
    if _sides(batch):
        return min(MOST_TOKENS, int(_lengths(batch).sort(descending=True).values[:2][-1]))
    values = [value.numel() for value in batch.values() if isinstance(value, torch.Tensor)]
    return min(_VALUES, max(values, default=0) // samples_in(batch))


def _lengths(batch: Batch) -> torch.Tensor:
    """`(samples,)`: different tokens of each, on the side that has fewest; zeros without token ids."""
    counts = [side.distinct for side in _sides(batch) if len(side.ids) == samples_in(batch)]
    return torch.stack(counts).amin(0) if counts else torch.zeros(samples_in(batch), dtype=torch.long)
