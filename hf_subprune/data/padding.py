"""Which rows of a layer's input are real tokens or spoken frames, so that padding never enters the moments."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..models.experts import routed_tokens
from ..models.linears import taps
from ..models.running import around
from ..models.sizes import Sizes

# Of the silent frames of an encoder that always hears as long, one of so many counts. As many as there are would be
# what the encoder is fitted to; where none is, what it puts out there drowns the speech: the last frames of Whisper's
# window, a few dozen, have hundreds of times the energy of all others.
_SILENT = 10


def token_mask(
    model: PreTrainedModel, consumer: str, batch: Mapping[str, Any], shape: Sequence[int]
) -> torch.Tensor | None:
    """Which rows of a consumer's input are real tokens rather than padding, or frames that hold sound.

    Args:
        model: The model that ran.
        consumer: Dotted path of the consumer: decoders have their own mask, image towers have none. `""` stands for
            the model's output.
        batch: The forward's arguments.
        shape: Of the consumer's input, `(batch, length, n)`, `(length, batch, n)` or `(batch * length, n)`; of an
            expert's, that of the latest call, `(rows, n)`.

    Returns:
        `(rows,)` bool, one for each row of the input flattened to `(rows, n)`; `None` when every row counts: nothing
        is padding, or no mask of the batch speaks of such rows (patches of an image). Where an encoder always hears
        as long, consumers have a few rows of the silence, too.
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
    if not in_decoder and ("input_ids" not in batch or _is_within(model, consumer, model.get_encoder("audio"))):
        frames = spoken_frames(model, batch)
        if frames is not None:
            mask = _strided(frames, shape[:-1])
            mask = _with_silence(mask) if consumer and mask is not None else mask
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


def spoken_frames(model: PreTrainedModel, batch: Mapping[str, Any]) -> torch.Tensor | None:
    """Which frames of the spectrograms hold sound, where the model takes spectrograms of one length only.

    What a clip lacks of that length is silence, which the model reads, but which tells nothing of what it is to do.

    Args:
        model: That takes the batch.
        batch: The forward's arguments. A mask of the frames among them, the feature extractor's, counts besides.

    Returns:
        `(samples, frames)` bool, false behind the last frame with a value above the least of its sample; the first
        frame always counts. `None` for models that take any length, and without spectrograms.
    """
    features = batch.get("input_features")
    positions = Sizes(model.config).get("max_source_positions", within="audio")
    if not isinstance(features, torch.Tensor) or features.ndim != 3 or not positions or features.shape[2] % positions:
        return None
    frames = features.shape[2]
    place = torch.arange(frames, device=features.device)
    loud = features.amax(1) > features.amin((1, 2))[:, None]
    spoken = place <= torch.where(loud, place, 0).amax(1, keepdim=True)
    for name, mask in batch.items():
        if name.endswith("mask") and not name.startswith("decoder") and mask.shape == spoken.shape:
            spoken &= mask.to(spoken.device).bool()
    spoken[:, 0] = True
    return spoken


def _strided(frames: torch.Tensor, rows: Sequence[int]) -> torch.Tensor | None:
    """The mask of an encoder's frames, each of which stands for equally many of a spectrogram's.

    Args:
        frames: `(samples, frames)` bool.
        rows: Leading dimensions of what the encoder computes: samples and its frames, in either order or as one.

    Returns:
        `(samples, frames of the encoder)`; `None` where the rows are something else.
    """
    samples, length = frames.shape
    count, left = divmod(math.prod(rows), samples)
    if left or not count or length % count or len(rows) > 2 or (len(rows) == 2 and samples not in rows):
        return None
    return frames[:, :: length // count]


def _with_silence(spoken: torch.Tensor) -> torch.Tensor:
    """Spoken frames, and of the silent ones some at equal distances: `(samples, frames)` bool."""
    silent = ~spoken
    return spoken | silent & (silent.cumsum(1) % _SILENT == 0)


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
