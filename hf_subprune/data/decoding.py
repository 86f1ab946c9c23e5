"""Decoder inputs for encoder-decoder models, without labels: what their decoders are calibrated on."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from inspect import signature
from typing import Any
from warnings import catch_warnings, simplefilter

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from ..models.precision import fast_products
from ..models.running import Batch, on_device, undisturbed
from .features import decoder_start, text_config
from .padding import spoken_frames

logger = logging.get_logger(__name__)

# Tokens that are generated for what is no sound (an image), and at most for a second of one: people say half as much.
_GENERATED = 64
_A_SECOND = 8
# Values a second of a spectrogram and of a waveform, as speech models of Transformers have them.
_RATES = {"input_features": 100, "input_values": 16_000}


def add_decoder_inputs(model: PreTrainedModel, batch: Batch) -> None:
    """Give an encoder-decoder model, whose forward takes `decoder_input_ids`, those where the batch has none."""
    if {"decoder_input_ids", "decoder_inputs_embeds"} & set(batch):
        return
    decoder_config = model.config.get_text_config(decoder=True)
    start = decoder_start(model.config)
    ids = batch.get("input_ids")
    if ids is not None and text_config(model.config).vocab_size == decoder_config.vocab_size:
        batch["decoder_input_ids"] = torch.cat([torch.full_like(ids[:, :1], start), ids[:, :-1]], dim=1)
        if "attention_mask" in batch:
            mask = batch["attention_mask"]
            batch["decoder_attention_mask"] = torch.cat([torch.ones_like(mask[:, :1]), mask[:, :-1]], dim=1)
    elif model.can_generate():
        batch |= _generated(model, batch)
    else:
        logger.warning(
            f"{type(model).__name__} cannot generate and the data has no decoder_input_ids: its decoder is calibrated "
            "on the start token alone. Pass ready batches with decoder_input_ids, or the model with its head."
        )
        batch["decoder_input_ids"] = torch.full((len(next(iter(batch.values()))), 1), start)


def generated(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """`(samples, length)` int64 on the CPU: what a model says of a batch, greedily, from the start token on.

    No longer than a decoder's positions allow, nor than can be said in the time that a sound takes. Nothing of the
    model is changed, and what Transformers has to say about its generation config is not said.

    Args:
        model: That can generate.
        batch: Arguments of its forward, for the encoder.
    """
    generator: Any = model
    config = model.config.get_text_config(decoder=True)
    limits = (getattr(config, name, None) for name in ("max_target_positions", "max_position_embeddings"))
    length = min(limit for limit in (1 + _most_tokens(model, batch), *limits) if limit)
    options: dict[str, Any] = {}
    with undisturbed(model), fast_products(model.parameters()), torch.no_grad(), _quiet():
        wanted = deepcopy(generator.generation_config)
        wanted.update(max_length=length, max_new_tokens=None, do_sample=False, num_beams=1, use_cache=True)
        if "force_unique_generate_call" in signature(generator.generate).parameters:
            # Whisper goes on in a loop over long sound otherwise, and leaves out the tokens that it begins with.
            wanted.update(return_timestamps=False)
            options["force_unique_generate_call"] = True
        return generator.generate(**on_device(model, batch), generation_config=wanted, **options).cpu()


def _most_tokens(model: PreTrainedModel, batch: Batch) -> int:
    name = next((name for name in _RATES if name in batch), None)
    if name is None:
        return _GENERATED
    spoken = spoken_frames(model, batch)
    values = max(batch[name].shape[1:]) if spoken is None else int(spoken.sum(1).max())
    return max(_A_SECOND, math.ceil(_A_SECOND * values / _RATES[name]))


@contextmanager
def _quiet() -> Iterator[None]:
    """Within the context Transformers and Python warn of nothing."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with catch_warnings():
            simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)


def _generated(model: PreTrainedModel, batch: Batch) -> Batch:
    """Generated decoder inputs, and the mask of those up to and with the end token."""
    ids = generated(model, batch)
    end = model.generation_config.eos_token_id  # type: ignore[union-attr]
    ends = torch.as_tensor([] if end is None else end)
    ended = torch.isin(ids[:, 1:], ends).cumsum(1) > 0
    # Row t is real when no end token came before it; the start token itself always is.
    mask = torch.cat([torch.ones_like(ids[:, :1]), torch.ones_like(ids[:, :1]), (~ended[:, :-1]).to(ids)], dim=1)
    return {"decoder_input_ids": ids, "decoder_attention_mask": mask[:, : ids.shape[1]]}
