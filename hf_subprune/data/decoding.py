"""Decoder inputs for encoder-decoder models, without labels: what their decoders are calibrated on."""

from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from .features import text_config

logger = logging.get_logger(__name__)

Batch = dict[str, torch.Tensor]

# Tokens that a model without text input (speech, image to text) generates.
_GENERATED = 64


def add_decoder_inputs(model: PreTrainedModel, batch: Batch) -> None:
    """Give an encoder-decoder model, whose forward takes `decoder_input_ids`, those where the batch has none."""
    if {"decoder_input_ids", "decoder_inputs_embeds"} & set(batch):
        return
    decoder_config = model.config.get_text_config(decoder=True)
    start = next(
        token
        for token in (
            getattr(model.config, "decoder_start_token_id", None),
            getattr(decoder_config, "decoder_start_token_id", None),
            getattr(decoder_config, "bos_token_id", None),
            getattr(decoder_config, "pad_token_id", None),
            0,
        )
        if token is not None
    )
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


def _generated(model: PreTrainedModel, batch: Batch) -> Batch:
    """Greedily generated decoder inputs, and the mask of those up to and with the end token."""
    inputs: dict[str, Any] = {name: value.to(model.device) for name, value in batch.items()}
    generator: Any = model
    training = model.training
    config = model.config.get_text_config(decoder=True)
    limits = (getattr(config, name, None) for name in ("max_target_positions", "max_position_embeddings"))
    length = min(limit for limit in (1 + _GENERATED, *limits) if limit)
    try:
        ids = generator.eval().generate(**inputs, max_length=length, do_sample=False, num_beams=1).cpu()
    finally:
        model.train(training)
    end = generator.generation_config.eos_token_id
    ends = torch.as_tensor([] if end is None else end)
    ended = torch.isin(ids[:, 1:], ends).cumsum(1) > 0
    # Row t is real when no end token came before it; the start token itself always is.
    mask = torch.cat([torch.ones_like(ids[:, :1]), torch.ones_like(ids[:, :1]), (~ended[:, :-1]).to(ids)], dim=1)
    return {"decoder_input_ids": ids, "decoder_attention_mask": mask[:, : ids.shape[1]]}
