"""What two models put out on the same batches, in the rows that are compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from transformers import PreTrainedModel

from ..data.batches import classes_of, cut_to_logits
from ..data.padding import token_mask
from ..data.probe import samples_in
from ..models.running import Batch, floating_tensors, forward_outputs

# Bytes of reference outputs that are held for one batch list; beyond that, evenly spaced tokens stand for all.
_STORED_BYTES = 100 * 2**20


@dataclass(frozen=True, eq=False)
class Outputs:
    """What is compared of one batch's output, or of that of some of its samples.

    Args:
        kind: `"logits"`, or `"hidden"` for anything that is no distribution over classes.
        rows: `(tokens, k)` on the CPU, of real tokens only (of samples where the output has one row per sample);
            at most what the limit on stored bytes allows, evenly spaced.
        samples: `(tokens,)` int64, the sample that each row is of.
        pooled: `(samples, k)`, mean over a sample's real tokens; `None` for logits, or without a token dimension.
        places: `(p,)` int64, places in every sequence, where the logits of no others were asked for.
    """

    kind: str
    rows: torch.Tensor
    samples: torch.Tensor
    pooled: torch.Tensor | None
    places: torch.Tensor | None = None


def model_outputs(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    rest: Callable[[int], AbstractContextManager[None]] | None = None,
) -> list[Outputs]:
    """The reference that `drift.drift` compares with, to be taken of the model that is not changed.

    Args:
        model: The model.
        batches: To run.
        rest: Inside of what it gives for the position of a batch, a forward of that batch, uncut, runs only what it
            must.
    """
    return list(iter_outputs(model, batches, rest))


def iter_outputs(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    rest: Callable[[int], AbstractContextManager[None]] | None = None,
) -> Iterator[Outputs]:
    """As `model_outputs`, one after the other: nothing is stored when both models are at hand."""
    for number, batch in enumerate(batches):
        parts = cut_to_logits(model, batch)
        for part in parts:
            with nullcontext() if rest is None or len(parts) > 1 else rest(number):
                outputs = _reference(model, part, _STORED_BYTES // (len(batches) * len(parts)))
            yield outputs


def outputs_like(model: PreTrainedModel, batch: Batch, old: Outputs) -> Outputs:
    """The rows of a batch's output that a reference holds."""
    return _outputs(model, batch, old.places, len(old.rows))


def _reference(model: PreTrainedModel, batch: Batch, room: int) -> Outputs:
    """As many evenly spaced rows of a batch's output as `room` bytes hold."""
    classes = classes_of(model)
    places = _places(model, batch, room // (classes * model.dtype.itemsize)) if classes else None
    return _outputs(model, batch, places, None, room)


def _places(model: PreTrainedModel, batch: Batch, most: int) -> torch.Tensor | None:
    """Evenly spaced places of sequences, if their logits alone can be asked for and those of all are too many."""
    ids = batch.get("input_ids")
    if ids is None or ids.ndim != 2 or "logits_to_keep" not in signature(model.forward).parameters:
        return None
    samples, length = ids.shape
    each = max(1, most // samples)
    return None if each >= length else ((torch.arange(each) + 0.5) * length / each).long()


def _outputs(
    model: PreTrainedModel, batch: Batch, places: torch.Tensor | None, most: int | None, room: int = 0
) -> Outputs:
    """The rows of a batch's output at some places, or at all: at most so many, or as many as `room` bytes hold."""
    asked = batch if places is None else {**batch, "logits_to_keep": places}
    kind, output = compared_output(forward_outputs(model, asked))
    shape = output.shape
    if places is not None and output.ndim == 3 and shape[1] == len(places):
        shape = torch.Size((shape[0], batch["input_ids"].shape[1], shape[2]))
    elif places is not None and output.ndim == 3:  # it takes the argument and minds it not
        output = output[:, places.to(output.device)]
    mask = token_mask(model, "", batch, shape)
    if mask is not None and places is not None:
        mask = mask.view(shape[:2])[:, places.to(mask.device)].flatten()
    rows = output.reshape(-1, output.shape[-1])
    samples = torch.arange(len(rows))
    if output.ndim > 1 and output.shape[0] == samples_in(batch):
        samples = samples // max(1, len(rows) // output.shape[0])
    if mask is not None:
        rows, samples = rows[mask.to(rows.device)], samples[mask.cpu()]
    if most is None:
        most = max(1, room // (rows.shape[1] * rows.element_size()))
    if len(rows) > most:
        spaced = torch.linspace(0, len(rows) - 1, most).round().long()
        rows, samples = rows[spaced.to(rows.device)], samples[spaced]
    pooled = mean_over_tokens(model, batch, output) if kind == "hidden" and output.ndim == 3 else None
    return Outputs(kind, rows.cpu(), samples, pooled, places)


def compared_output(output: Mapping[str, Any]) -> tuple[str, torch.Tensor]:
    """The tensor that stands for a model's output: logits over classes, else hidden states, else the first one."""
    logits = output.get("logits")
    if isinstance(logits, torch.Tensor) and logits.ndim >= 2 and logits.shape[-1] > 1:
        return "logits", logits
    for tensor in floating_tensors([output.get("last_hidden_state"), output]):
        if tensor.ndim > 0:
            return "hidden", tensor
    raise ValueError(f"The model's output has no floating-point tensor to compare, found: {', '.join(output)}.")


def mean_over_tokens(model: PreTrainedModel, batch: Batch, hidden: torch.Tensor) -> torch.Tensor:
    """`(samples, k)` on the CPU from hidden states `(samples, length, k)`."""
    mask = token_mask(model, "", batch, hidden.shape)
    if mask is None:
        return hidden.float().mean(1).cpu()
    weight = mask.view(hidden.shape[:2]).to(hidden.device).unsqueeze(-1)
    return ((hidden.float() * weight).sum(1) / weight.sum(1).clamp(min=1)).cpu()
