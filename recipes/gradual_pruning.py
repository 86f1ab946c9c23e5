"""Gradual against one-shot pruning of a text classifier, at the same size and with the same training steps.

A small BERT learns to tell which function word is missing from a sentence: of 15 words, with seven tokens on either
side, from the docstrings of the standard library, real text that every Python carries. The trained classifier then
trains on for some steps in which half of its MLP neurons and attention heads go, in one of three ways:

- before: `when="begin"`, all at once, and the small model trains for all of the steps;
- after: `when="end"`, the whole model trains for all of the steps, then all at once;
- gradual: `when="gradual"`, a cubic schedule over the first half of the steps, surgery at the end.

By how much gradual pruning is better is printed with the spread of that difference over seeds, which the size of the
test data and the luck of each training make.

    python recipes/gradual_pruning.py                # three seeds, some minutes on two cores
    python recipes/gradual_pruning.py --seeds 1 --steps 50 --original-steps 200
    python recipes/gradual_pruning.py --validate     # on other text, by which the schedule was chosen

No network, no other data and no pretrained model is needed.
"""

import argparse
import copy
import statistics
from collections.abc import Sequence

from datasets import Dataset
from missing_word import PARAGRAPHS, accuracy, make_classifier, make_data, train
from transformers.utils import logging

from hf_subprune import PruneConfig
from hf_subprune.callback import SubpruneCallback

WAYS = {
    "before": {"when": "begin"},
    "after": {"when": "end"},
    "gradual": {"when": "gradual"},
}


def run(
    seed: int, steps: int, original_steps: int, config: PruneConfig, training: Dataset, test: Dataset, vocabulary: int
) -> dict[str, dict[str, float]]:
    """Accuracy and parameters of the original, and after `steps` more with each way to prune.

    Args:
        seed: Of the weights and of the order of the samples.
        steps: Training steps that each way has.
        original_steps: Training steps of the original.
        config: What to keep, the same for all ways.
        training: To train and calibrate on.
        test: To test on.
        vocabulary: Number of tokens.
    """
    original = train(make_classifier(vocabulary, seed), training, original_steps, 3e-3, seed)
    results = {"original": {"accuracy": accuracy(original, test), "parameters": original.num_parameters()}}
    for name, way in WAYS.items():
        callback = SubpruneCallback(config, **way)
        model = train(copy.deepcopy(original), training, steps, 1e-3, seed, callback)
        results[name] = {"accuracy": accuracy(model, test), "parameters": model.num_parameters()}
    return results


def main(arguments: Sequence[str] | None = None) -> list[dict[str, dict[str, float]]]:
    """Run every seed; print a table of accuracies, and by how much gradual pruning is better, with the spread."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--steps", type=int, default=300, help="training steps that each way has")
    parser.add_argument("--original-steps", type=int, default=2400, help="training steps of the original")
    parser.add_argument("--keep", type=float, default=0.5, help="fraction of neurons and heads to keep")
    parser.add_argument("--samples", type=int, default=256, help="samples to calibrate on")
    parser.add_argument("--paragraphs", type=int, default=PARAGRAPHS, help="of text, to train and to test on")
    parser.add_argument("--validate", action="store_true", help="test on text that is neither trained nor tested on")
    options = parser.parse_args(arguments)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    held_out = max(1, options.samples // 4)
    # Training mends the residual stream: a step need not.
    config = PruneConfig(keep=options.keep, variant="layer", samples=options.samples, held_out=held_out)
    training, test, tokenizer = make_data(options.paragraphs, validate=options.validate)
    print(f"{len(training)} gaps to train on, {len(test)} to test on")
    print("seed  " + "".join(f"{name:>10}" for name in ("original", *WAYS)))
    results = []
    for seed in range(options.seeds):
        found = run(seed, options.steps, options.original_steps, config, training, test, len(tokenizer))
        results.append(found)
        print(f"{seed:<6}" + "".join(f"{row['accuracy']:10.4f}" for row in found.values()), flush=True)
    means = {name: statistics.mean(found[name]["accuracy"] for found in results) for name in results[0]}
    print("mean  " + "".join(f"{mean:10.4f}" for mean in means.values()))
    for name in ("before", "after"):
        gains = [found["gradual"]["accuracy"] - found[name]["accuracy"] for found in results]
        spread = f", standard deviation over seeds {statistics.stdev(gains):.4f}" if len(gains) > 1 else ""
        print(f"gradual less {name}: {statistics.mean(gains):+.4f}{spread}")
    return results


if __name__ == "__main__":
    main()
