"""Calibration batches: cut into smaller ones, described, and which of their rows are real tokens."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

import torch
from accelerate.utils import find_executable_batch_size
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..models.running import Batch
from ..runs.memory import ran_out_of_memory
from ..runs.processes import own_share, processes
from .padding import spoken_frames, token_mask
from .probe import MOST_TOKENS, is_divisible, probe_of, samples_in

logger = logging.get_logger(__name__)

_T = TypeVar("_T")

# Logits over many classes are made for some samples at a time: so many numbers at once, unless one sample has more.
_LOGITS_AT_ONCE = 1 << 23


@dataclass(frozen=True, eq=False)
class Samples:
    """Batches of forward arguments, without labels.

    Args:
        fit: Batches to fit on, at least two when there are two samples. The two folds of cross-fitting are the even
            and the odd ones.
        held_out: Batches, never fitted on, to measure the output's drift on.
        fit_samples: Samples in `fit`.
        held_out_samples: Samples in `held_out`.
        source: What the data was, in words.
        model: The model the batches are for; it knows which consumers lie in a decoder or an image tower.
        cut: What part of the samples' tokens (of waveforms, their values) did not get into the batches.
        tokenizer: Of the model, where it is known.
    """

    fit: list[Batch]
    held_out: list[Batch]
    fit_samples: int
    held_out_samples: int
    source: str
    model: PreTrainedModel = field(repr=False)
    cut: float = 0.0
    tokenizer: PreTrainedTokenizerBase | None = field(default=None, repr=False)

    @classmethod
    def of(cls, model: PreTrainedModel, batches: Sequence[Batch]) -> "Samples":
        """Batches as they are, to fit on, of which none is held out."""
        return cls(list(batches), [], sum(map(samples_in, batches)), 0, source="batches", model=model)

    @cached_property
    def probe(self) -> Batch:
        """Two samples, for what is found out on few of them: see `probe_of`."""
        return probe_of(self.model, self.fit)

    @property
    def short_probe(self) -> Batch:
        """The probe of texts, one of its samples of all else: for what one sample shows as well as two."""
        return brief(self.probe, 2 * MOST_TOKENS)

    def in_batches_of(self, size: int) -> "Samples":
        """The same samples, batches cut into ones of at most `size` samples; the folds stay as they are, or nearly.

        Those held out are cut further, to what logits are made of at once. Batches whose tensors cannot be cut stay
        whole.
        """
        even, odd = ([piece for batch in self.fit[fold::2] for piece in pieces(batch, size)] for fold in range(2))
        pairs = itertools.zip_longest(even, odd)
        fit = [batch for pair in pairs for batch in pair if batch is not None]
        held_out = (piece for batch in self.held_out for piece in pieces(batch, size))
        parts = [part for piece in held_out for part in cut_to_logits(self.model, piece)]
        return replace(self, fit=fit, held_out=parts)

    @property
    def measured_on(self) -> Batch:
        """The batch whose forwards are timed and counted: of medium length, where batches go by that."""
        return self.fit[len(self.fit) // 2]

    @property
    def own_held_out(self) -> list[Batch]:
        """The held-out batches that fall to this process, when several share them."""
        return [self.held_out[number] for number in own_share(len(self.held_out))]

    @property
    def description(self) -> dict[str, Any]:
        """The data in plain JSON types: where it came from, its samples, and its tokens where it has any.

        `cut` is what part of the samples was left out, `padded` what part of the batches is padding: of tokens, or of
        frames that a spectrogram has behind the sound.
        """
        return {
            "source": self.source,
            "fit_samples": self.fit_samples,
            "held_out_samples": self.held_out_samples,
            "fit_tokens": tokens_in(self.fit),
            "held_out_tokens": tokens_in(self.held_out),
            "cut": self.cut,
            "padded": _padded(self.model, [*self.fit, *self.held_out]),
        }

    def mask(self, shape: Sequence[int], index: int, consumer: str) -> torch.Tensor | None:
        """Which rows of a consumer's input are real tokens.

        Args:
            shape: `(batch, length, n)`, `(length, batch, n)` or `(rows, n)`.
            index: Of the batch that ran, the held-out ones counted behind those to fit on.
            consumer: Dotted path of the consumer.

        Returns:
            `(rows,)` bool, false at padding; `None` when every row counts.
        """
        batch = self.fit[index] if index < len(self.fit) else self.held_out[index - len(self.fit)]
        return token_mask(self.model, consumer, batch, shape)

    def rows(self, x: torch.Tensor, index: int, consumer: str) -> torch.Tensor:
        """The real tokens of a consumer's input or output `(..., n)`, as `(tokens, n)`: see `mask`."""
        mask = self.mask(x.shape, index, consumer)
        flat = x.reshape(-1, x.shape[-1])
        return flat if mask is None else flat[mask.to(flat.device)]


def tokens_in(batches: Sequence[Batch]) -> int | None:
    """Real tokens of the batches; `None` without token ids."""
    if not batches or "input_ids" not in batches[0]:
        return None
    return sum(int(batch.get("attention_mask", torch.ones_like(batch["input_ids"])).sum()) for batch in batches)


def entries(batch: Batch) -> int:
    """Numbers in a batch, of its largest tensor: tokens, pixels."""
    return max(value.numel() for value in batch.values() if isinstance(value, torch.Tensor))


def _padded(model: PreTrainedModel, batches: list[Batch]) -> float:
    """What part of the batches' tokens or frames is padding."""
    tokens = tokens_in(batches)
    if tokens:
        return 1 - tokens / sum(batch["input_ids"].numel() for batch in batches)
    spoken = [frames for batch in batches if (frames := spoken_frames(model, batch)) is not None]
    return 1 - sum(int(frames.sum()) for frames in spoken) / sum(map(torch.numel, spoken)) if spoken else 0.0


def pieces(batch: Batch, size: int) -> list[Batch]:
    """The batch in batches of at most `size` samples; as it is where it cannot be cut."""
    return cut_batches([batch], 0, samples_in(batch), size) if is_divisible(batch) else [batch]


def cut_to_logits(model: PreTrainedModel, batch: Batch) -> list[Batch]:
    """The batch in pieces whose logits are few enough to be held at once: one sample at least."""
    length = max((batch[name].shape[-1] for name in ("input_ids", "decoder_input_ids") if name in batch), default=1)
    size = max(1, _LOGITS_AT_ONCE // max(classes_of(model) * length, 1))
    return [batch] if samples_in(batch) <= size else pieces(batch, size)


def classes_of(model: PreTrainedModel) -> int:
    """How many logits a token gets; 0 where it gets none."""
    weight = getattr(model.get_output_embeddings(), "weight", None)
    return len(weight) if isinstance(weight, torch.Tensor) else 0


def brief(batch: Batch, tokens: int) -> Batch:
    """The first samples of a batch, of about so many tokens in all; of samples that are longer, a part of the first.

    One sample of what has no tokens; a batch that cannot be cut stays as it is.
    """
    if not is_divisible(batch):
        return batch
    ids = batch.get("input_ids")
    if not isinstance(ids, torch.Tensor) or ids.ndim != 2:
        return {name: value[:1] for name, value in batch.items()}
    length = ids.shape[1]
    few = {name: value[: max(1, tokens // length)] for name, value in batch.items()}
    if length <= tokens or any(value.shape[1:] != (length,) for value in few.values()):
        return few
    mask = few.get("attention_mask")
    start = length - tokens if mask is not None and not mask[0, 0] else 0  # padding is on the left there
    return {name: value[:, start : start + tokens] for name, value in few.items()}


def cut_batches(batches: list[Batch], start: int, stop: int, largest: int) -> list[Batch]:
    """Rows `start` to `stop`, counted over all batches, in batches of at most `largest`."""
    pieces = []
    for batch in batches:
        rows = samples_in(batch)
        for first in range(max(start, 0), min(stop, rows), largest):
            last = min(first + largest, stop, rows)
            pieces.append({name: value[first:last] for name, value in batch.items()})
        start, stop = start - rows, stop - rows
    return pieces


class FittingBatches:
    """The batches of a run, halved for good whenever memory runs out.

    Args:
        samples: In the batches to begin with.

    Attributes:
        samples: In the batches that fit so far.
        size: Samples that these have at most.
    """

    def __init__(self, samples: Samples) -> None:
        batches = [*samples.fit, *samples.held_out]
        self.size = max((len(next(iter(batch.values()))) for batch in batches if is_divisible(batch)), default=1)
        self.samples = samples.in_batches_of(self.size)
        self._whole = samples

    def run(self, attempt: Callable[[Samples], _T]) -> _T:
        """What `attempt` returns for batches that fit; what it changed is undone when it fails.

        Raises:
            RuntimeError: there is no memory for a single sample, or in one of several processes, which cannot start
                anew without the others.
        """
        try:
            return attempt(self.samples)
        except (RuntimeError, MemoryError) as failure:
            if not ran_out_of_memory(failure):
                raise
            if processes() > 1:
                raise RuntimeError(
                    f"One of {processes()} processes ran out of memory with batches of {self.size} samples: give a "
                    "smaller `batch_size`."
                ) from failure

        def smaller(size: int) -> _T:
            self.samples = self._whole.in_batches_of(size)
            try:
                return attempt(self.samples)
            except MemoryError as failure:  # Python's own, which accelerate does not count
                raise torch.OutOfMemoryError("The CPU is out of memory.") from failure

        # Not before: it collects garbage first, which takes as long as pruning a block of a small model.
        return find_executable_batch_size(smaller, self._halve(), self._halve)()

    def _halve(self) -> int:
        self.size //= 2
        if self.size:
            logger.warning(f"Out of memory: going on with batches of at most {self.size} samples.")
        return self.size
