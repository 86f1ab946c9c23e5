"""Text that a language model makes up itself, to calibrate it on where there is no other."""

from __future__ import annotations

from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from ..models.precision import fast_products
from ..models.running import generating_plainly, goes_on_with_text, input_device, undisturbed
from .features import text_config
from .reading import longest_text


def generated_text(
    model: PreTrainedModel,
    tokenizer: Any,
    samples: int = 160,
    *,
    max_length: int = 256,
    batch_size: int = 16,
    seed: int = 0,
) -> list[str]:
    """Text sampled from a language model, for `prune` and `recover` in place of text of its domain.

    Every text begins with what the tokenizer puts in front of one, as a rule the token that says so; where it puts
    nothing there, with a token drawn evenly from the vocabulary (as in LLM-QAT, arXiv 2305.17888). From there on each
    token is drawn from the model's own distribution, at temperature 1 and without special tokens, so that no text ends
    early, whatever its `generation_config` says.

    On such text heads seem to do less than on real text: `units=("mlp",)` and `variant="layer"` are the safer choice.

    Args:
        model: A causal language model; not changed, nor is the state of random numbers.
        tokenizer: Its tokenizer.
        samples: Number of texts; 160 are as many as `prune` reads by default, to fit on and to hold out.
        max_length: Tokens of each text, its beginning included; fewer where the model or its tokenizer takes fewer.
        batch_size: Texts that are generated at once.
        seed: Of every draw: the same one gives the same texts, on the same device and with the same `batch_size`.

    Raises:
        TypeError: `tokenizer` is none, or a number is not whole.
        ValueError: the model does not go on with text, or a number is too small.
    """
    _check(model, tokenizer)
    for name, value in {"samples": samples, "max_length": max_length, "batch_size": batch_size}.items():
        if not isinstance(value, int):
            raise TypeError(f"`{name}` is a number of texts or tokens, a whole one, not {value!r}.")
    prefix = _prefix(tokenizer)
    begun = max(1, len(prefix))
    length = longest_text(model, tokenizer, max_length)
    if samples < 1 or batch_size < 1 or length <= begun:
        raise ValueError(
            f"`samples` and `batch_size` must be 1 or more, and texts longer than the {begun} tokens that they begin "
            f"with; got {samples}, {batch_size} and {length}."
        )
    known, left_out = _vocabulary(model, tokenizer)
    config = GenerationConfig(
        do_sample=True,
        num_beams=1,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        repetition_penalty=1.0,
        suppress_tokens=left_out,
        min_new_tokens=length - begun,
        max_new_tokens=length - begun,
        pad_token_id=0,  # for nothing: all texts are equally long
        use_cache=True,
    )
    generator: Any = model
    texts: list[str] = []
    with undisturbed(model), generating_plainly(model), fast_products(model.parameters()):
        torch.manual_seed(seed)
        while len(texts) < samples:
            rows = min(batch_size, samples - len(texts))
            start = torch.tensor(prefix).expand(rows, -1) if prefix else known[torch.randint(len(known), (rows, 1))]
            start = start.to(input_device(model))
            ids = generator.generate(start, attention_mask=torch.ones_like(start), generation_config=config)
            texts += tokenizer.batch_decode(ids, skip_special_tokens=True)
    return texts


def _check(model: PreTrainedModel, tokenizer: Any) -> None:
    """Refuse what does not go on with text, before any work."""
    if not callable(getattr(tokenizer, "batch_decode", None)) or hasattr(tokenizer, "image_processor"):
        raise TypeError(
            f"Generated text needs the model's tokenizer, got {type(tokenizer).__name__}: load it with "
            "AutoTokenizer.from_pretrained."
        )
    if not goes_on_with_text(model):
        raise ValueError(
            f"{type(model).__name__} does not go on with text, so that it cannot make up its own: load a language "
            "model with its head (AutoModelForCausalLM), or calibrate on data."
        )


def _prefix(tokenizer: Any) -> list[int]:
    """Ids that the tokenizer puts in front of a text."""
    plain, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    return whole[: whole.index(plain[0])] if plain else []


def _vocabulary(model: PreTrainedModel, tokenizer: Any) -> tuple[torch.Tensor, list[int]]:
    """Ids that make text, as int64, and those of the model's that do not: special ones, and ones without a token."""
    added = tokenizer.added_tokens_decoder
    special = {*tokenizer.all_special_ids, *(number for number, token in added.items() if token.special)}
    unknown = range(len(tokenizer), text_config(model.config).vocab_size)
    known = sorted(set(range(len(tokenizer))) - special)
    return torch.tensor(known), sorted({*special, *unknown})
