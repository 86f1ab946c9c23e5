"""The same texts, continued by a language model before and after it is pruned, for people to read."""

from __future__ import annotations

from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import logging

from ..data.batches import Samples
from ..data.features import most_positions
from ..models.running import generating_plainly, goes_on_with_text, input_device, is_offloaded, undisturbed
from ..report.records import Continuation
from ..runs.memory import is_of_the_machine

logger = logging.get_logger(__name__)

# Nobody's data: they are shown to whoever sees the report.
_PROMPTS = (
    "The first thing that you notice about the old city is",
    "To make good bread at home, you need flour, water and",
    "Once upon a time there was a little girl who lived in",
)
_NEW = 24


def beginnings(samples: Samples) -> torch.Tensor | None:
    """How some texts begin, `(texts, tokens)` int64: all as long as the shortest.

    `None` where nobody could read how they go on: the model does not go on with text, its tokenizer is unknown, or a
    forward reads weights from elsewhere, of which this would take many.
    """
    model, tokenizer = samples.model, samples.tokenizer
    if tokenizer is None or not goes_on_with_text(model) or is_offloaded(model):
        return None
    begun = [tokenizer(prompt)["input_ids"] for prompt in _PROMPTS]
    length, most = min(map(len, begun)) - 1, most_positions(model)  # some put a sign behind the end
    if length < 1 or (most is not None and most < length + _NEW):
        return None
    return torch.tensor([ids[:length] for ids in begun])


def continued(model: PreTrainedModel, begun: torch.Tensor | None) -> torch.Tensor | None:
    """How the model goes on, `(texts, tokens)` int64 on the CPU, taking the likeliest token each time.

    `None` where there is nothing to go on with, or the model's `generate` fails, on which nothing else depends.
    """
    if begun is None:
        return None
    config = GenerationConfig(
        do_sample=False, max_new_tokens=_NEW, min_new_tokens=_NEW, pad_token_id=0, use_cache=True
    )
    begun = begun.to(input_device(model))
    generator: Any = model
    try:
        with undisturbed(model), generating_plainly(model), torch.no_grad():
            ids = generator.generate(begun, attention_mask=torch.ones_like(begun), generation_config=config)
    except Exception as error:
        if is_of_the_machine(error):
            raise
        logger.info("No text is continued: %s", error)
        return None
    return ids[:, begun.shape[1] :].cpu()


def side_by_side(
    tokenizer: Any, begun: torch.Tensor | None, before: torch.Tensor | None, after: torch.Tensor | None
) -> tuple[Continuation, ...]:
    """Texts, and how both models continue them; none where one of them did not."""
    if begun is None or before is None or after is None:
        return ()
    columns = (tokenizer.batch_decode(ids, skip_special_tokens=True) for ids in (begun, before, after))
    return tuple(Continuation(*row) for row in zip(*columns, strict=True))
