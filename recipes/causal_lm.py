"""Prune a causal language model, and compare perplexities: greedy selection with new weights against magnitudes.

A small Llama with grouped-query attention learns the docstrings of the standard library for a minute; with `--model`,
any language model of yours is pruned instead.

    pip install 'hf_subprune[evaluate]'
    python recipes/causal_lm.py
    python recipes/causal_lm.py --model FOLDER_OR_HUB_ID --steps 0
"""

import argparse
import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from missing_word import make_tokenizer
from tables import before_and_after, print_table
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, set_seed
from transformers.utils import logging

from hf_subprune import PruneConfig, prune
from hf_subprune.data.datafiles import load_model
from hf_subprune.data.reading import batch_all
from hf_subprune.demo import docstrings
from hf_subprune.evaluation.tasks import Perplexity, Trial

LENGTH = 64  # tokens of a text
WAYS = {
    "greedy, new weights": {},
    "weight x activation, new weights": {"importance": "wanda"},
    "weight x activation, old weights": {"importance": "wanda", "reweight": False},
}


def make_model(vocabulary: int) -> LlamaForCausalLM:
    """Four layers of eight heads, four of them for keys and values, at random."""
    set_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=LENGTH,
        )
    )


def train(model: PreTrainedModel, texts: Sequence[str], tokenizer: Any, steps: int) -> None:
    """So many steps of AdamW on batches of 16 texts, labels being the tokens themselves."""
    batches = list(batch_all(model, texts, tokenizer, max_length=LENGTH, batch_size=16))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for step in range(steps):
        batch = batches[step % len(batches)]
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()


def load_or_train(
    model: str | None, make: Callable[[int], PreTrainedModel], texts: Sequence[str], steps: int
) -> tuple[PreTrainedModel, Any]:
    """A language model and its tokenizer: one of yours, or one made here; trained on the texts if there are steps.

    Args:
        model: Folder or Hub id; if left out, `make` is called with the number of tokens.
        make: Makes a model at random.
        texts: To train on, and to make the tokenizer from.
        steps: Of training.
    """
    if model:
        loaded, tokenizer = load_model(model)
    else:
        tokenizer = make_tokenizer(texts)
        loaded = make(len(tokenizer))
    if steps:
        train(loaded, texts, tokenizer, steps)
    return loaded.eval(), tokenizer


def perplexity_trial(original: PreTrainedModel, tokenizer: Any, texts: Sequence[str]) -> Trial:
    """What pruned models are compared with the original by."""
    rows = [{"text": text} for text in texts]
    return Trial(Perplexity(rows, tokenizer, dataset="docstrings", max_length=LENGTH), original)


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Train if asked to, prune in every way and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub id; a small Llama made here when left out")
    parser.add_argument("--steps", type=int, default=600, help="training steps of the original")
    parser.add_argument("--keep", type=float, default=0.5, help="fraction of neurons and key/value groups to keep")
    parser.add_argument("--samples", type=int, default=256, help="paragraphs to calibrate on")
    parser.add_argument("--unseen", type=int, default=256, help="other paragraphs, to test on")
    options = parser.parse_args(arguments)
    logging.disable_progress_bar()
    unseen, texts = docstrings(options.unseen), docstrings(2800, offset=options.unseen)
    original, tokenizer = load_or_train(options.model, make_model, texts, options.steps)
    trial = perplexity_trial(original, tokenizer, unseen)
    common = {"samples": options.samples, "held_out": max(2, options.samples // 4), "max_length": LENGTH}
    common |= {"keep": options.keep, "budget": "uniform"}  # the same widths for all
    rows = []
    for name, way in WAYS.items():
        model = copy.deepcopy(original)
        report = prune(model, texts, PruneConfig(**common, **way), tokenizer)
        rows.append({"chosen by": name, "parameters": report.parameters.ratio, **before_and_after(trial, model)})
    print_table("Perplexity of unseen docstrings, with 95% intervals of the paired bootstrap", rows)
    return rows


if __name__ == "__main__":
    main()
