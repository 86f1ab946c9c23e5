"""Which rows of a layer's input are real tokens, so that padding never enters the moments."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..models.experts import routed_tokens
from ..models.linears import taps
from ..models.running import around


def token_mask(
    model: PreTrainedModel, consumer: str, batch: Mapping[str, Any], shape: Sequence[int]
) -> torch.Tensor | None:
    """Which rows of a consumer's input are real tokens rather than padding.

    Args:
        model: The model that ran.
        consumer: Dotted path of the consumer: decoders have their own mask, image towers have none. `""` stands for
            the model's output.
        batch: The forward's arguments.
        shape: Of the consumer's input, `(batch, length, n)`, `(length, batch, n)` or `(batch * length, n)`; of an
            expert's, that of the latest call, `(rows, n)`.

    Returns:
        `(rows,)` bool, one for each row of the input flattened to `(rows, n)`; `None` when every row counts: nothing
        is padding, or no mask of the batch speaks of such rows (patches of an image).
    """
    routed = routed_tokens(around(model, consumer), consumer)
    if routed is not None:
        experts, tokens, of = routed
        mask = token_mask(model, experts, batch, (of, shape[-1]))
        return None if mask is None else mask[tokens.to(mask.device)]
    if _is_within(model, consumer, model.get_encoder(modality="image")):
        return None
    in_decoder = model.config.is_encoder_decoder and (not consumer or _is_within(model, consumer, model.get_decoder()))
    mask = batch.get("decoder_attention_mask" if in_decoder else "attention_mask")
    if mask is not None and mask.shape == getattr(batch.get("input_ids"), "shape", None):
        mask = mask.flatten(0, -2)  # choices run as samples
    if mask is None or mask.ndim != 2:
        return None
    rows = tuple(shape[:-1])
    # The layers of a convolutional feature encoder have frames of other lengths than those that it puts out.
    at_frames = taps(model.get_submodule(consumer)) == 1
    if len(rows) == 2 and rows[0] == len(mask) and rows[1] < mask.shape[1] and at_frames:
        mask = _frame_mask(model, mask, rows[1])
    if rows in (tuple(mask.shape), (mask.numel(),)):
        mask = mask.bool().flatten()
    elif rows == tuple(mask.T.shape):
        mask = mask.bool().T.flatten()
    else:
        return None
    return None if mask.all() else mask


def _is_within(model: PreTrainedModel, path: str, tower: nn.Module) -> bool:
    parts = path.split(".")
    return tower is not model and any(
        model.get_submodule(".".join(parts[:depth])) is tower for depth in range(1, len(parts) + 1)
    )


def _frame_mask(model: PreTrainedModel, mask: torch.Tensor, frames: int) -> torch.Tensor:
    """The mask of a speech encoder's frames from that of its waveform; the mask itself for other models."""
    for owner in (model, model.base_model, model.get_encoder()):
        if (reduce := getattr(owner, "_get_feature_vector_attention_mask", None)) is not None:
            return reduce(frames, mask)
    return mask
