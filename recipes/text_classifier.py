"""Prune a text classifier to several sizes from one calibration, and score each with a metric module of `evaluate`.

A small BERT learns which function word is missing from a sentence (see missing_word.py). The metric is the file
metrics/accuracy.py; a name such as `accuracy` would be fetched from the Hub instead, which needs a network.

    pip install 'hf_subprune[evaluate]'
    python recipes/text_classifier.py
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from missing_word import PARAGRAPHS, make_classifier, make_data, train
from tables import print_table
from transformers.utils import logging

from hf_subprune import PruneConfig
from hf_subprune.evaluation.metrics import RESAMPLES, load_metric
from hf_subprune.evaluation.tasks import Classification, Trial
from hf_subprune.pruning import prune_sizes

METRIC = Path(__file__).parent / "metrics" / "accuracy.py"


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Train, prune to every size and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.75, 0.5, 0.25], help="fractions to keep")
    parser.add_argument("--steps", type=int, default=1200, help="training steps of the original")
    parser.add_argument("--paragraphs", type=int, default=PARAGRAPHS, help="of text, to train and to test on")
    parser.add_argument("--samples", type=int, default=256, help="samples to calibrate on")
    parser.add_argument("--test", type=int, default=1000, help="samples to test on")
    parser.add_argument("--resamples", type=int, default=RESAMPLES, help="of the bootstrap")
    parser.add_argument("--metric", default=str(METRIC), help="as for `hf-subprune evaluate`")
    options = parser.parse_args(arguments)
    logging.disable_progress_bar()
    training, test, tokenizer = make_data(options.paragraphs)
    model = train(make_classifier(len(tokenizer), seed=0), training, options.steps, learning_rate=3e-3, seed=0).eval()

    task = Classification(list(test.select(range(min(options.test, len(test))))), dataset="docstrings", batch_size=64)
    trial = Trial(task, model, load_metric(options.metric))
    common = {"samples": options.samples, "held_out": max(2, options.samples // 4)}
    configs = [PruneConfig(keep=keep, **common) for keep in options.keep]
    rows = []
    for config, report in zip(configs, prune_sizes(model, training, configs), strict=True):
        for metric in trial.score(model, options.resamples):
            before, after, change = metric.cells()
            row = {"keep": config.keep, "parameters": report.parameters.ratio, "metric": metric.name}
            rows.append(row | {"original": before, "pruned": after, "change": change})
    print_table("Which word is missing? With 95% intervals of the paired bootstrap", rows)
    return rows


if __name__ == "__main__":
    main()
