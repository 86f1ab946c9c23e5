"""What a model says of samples: embeddings, likelihoods, classes."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch.nn.functional import cross_entropy, normalize
from transformers import PreTrainedModel

from ..models.running import Batch, forward_outputs
from .outputs import mean_over_tokens


def embed(model: PreTrainedModel, batches: Iterable[Batch]) -> torch.Tensor:
    """`(samples, k)` float32 on the CPU: last hidden states averaged over real tokens, of unit norm.

    Raises:
        ValueError: the model without its head gives no `last_hidden_state`.
    """
    encoder: Any = model.base_model
    pooled = [mean_over_tokens(encoder, batch, _hidden(encoder, batch)) for batch in batches]
    return normalize(torch.cat(pooled).float(), dim=1)


def neighbour_agreement(first: torch.Tensor, second: torch.Tensor) -> float:
    """Fraction of samples whose nearest other sample is the same in both embeddings, `(samples, k)` each."""
    nearest = []
    for embeddings in (first, second):
        similarity = embeddings @ embeddings.T
        nearest.append(similarity.fill_diagonal_(-math.inf).argmax(1))
    return float((nearest[0] == nearest[1]).float().mean())


def log_losses(model: PreTrainedModel, batches: Iterable[Batch]) -> torch.Tensor:
    """Of a causal language model: `(samples, 2)` float64 on the CPU.

    The first column is the negative log-likelihood, in nats, of a sample's real tokens but the first one, the second
    the number of these tokens.

    Raises:
        ValueError: the model is no causal language model.
    """
    if not model.can_generate() or model.config.is_encoder_decoder:
        raise ValueError(f"Perplexity is that of a causal language model, which {type(model).__name__} is not.")
    found = []
    for batch in batches:
        logits = forward_outputs(model, batch)["logits"][:, :-1].float()
        targets = batch["input_ids"][:, 1:].to(logits.device)
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))[:, 1:].bool().to(logits.device)
        losses = cross_entropy(logits.transpose(1, 2), targets, reduction="none").double() * mask
        found.append(torch.stack([losses.sum(1), mask.sum(1).double()], dim=1).cpu())
    return torch.cat(found)


def perplexity(model: PreTrainedModel, batches: Iterable[Batch]) -> float:
    """Of a causal language model: exp of the mean negative log-likelihood of every real token but each first one."""
    total, tokens = log_losses(model, batches).sum(0).tolist()
    return math.exp(total / tokens)


def predicted_classes(model: PreTrainedModel, batches: Iterable[Batch]) -> torch.Tensor:
    """Of a classifier: `(samples,)` int64 on the CPU, the most likely class of each sample.

    Raises:
        ValueError: the model's logits are not one row of two classes or more for each sample.
    """
    found = []
    for batch in batches:
        logits = forward_outputs(model, batch).get("logits")
        if logits is None or logits.ndim != 2 or logits.shape[1] < 2:
            shape = "no logits" if logits is None else f"logits of shape {tuple(logits.shape)}"
            raise ValueError(f"{type(model).__name__} gives {shape} and is no classifier of samples.")
        found.append(logits.argmax(1).cpu())
    return torch.cat(found)


def written_tokens(model: PreTrainedModel, batches: Iterable[Batch]) -> list[list[int]]:
    """Of a model that writes down sounds or images: the tokens of each sample, generated or the likeliest of a frame.

    Raises:
        ValueError: the model does neither.
    """
    found: list[list[int]] = []
    for batch in batches:
        if "decoder_input_ids" in batch:  # without a text, batches have what the model generates
            found += batch["decoder_input_ids"].tolist()
            continue
        logits = forward_outputs(model, batch).get("logits")
        if logits is None or logits.ndim != 3:
            shape = "no logits" if logits is None else f"logits of shape {tuple(logits.shape)}"
            raise ValueError(f"{type(model).__name__} gives {shape} and writes nothing down.")
        found += logits.argmax(2).tolist()
    return found


def _hidden(encoder: PreTrainedModel, batch: Batch) -> torch.Tensor:
    output = forward_outputs(encoder, batch)
    if "last_hidden_state" not in output:
        raise ValueError(
            f"{type(encoder).__name__} gives no last_hidden_state to embed with, only {', '.join(output)}."
        )
    return output["last_hidden_state"]
