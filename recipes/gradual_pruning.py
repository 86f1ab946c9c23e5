"""Gradual against one-shot pruning of a text classifier, at the same size and after the same number of training steps.

A small BERT learns to tell which function word is missing from a sentence: of 15 words, with seven tokens on either
side, from the docstrings of the standard library, real text that every Python carries. Half of its MLP neurons and
attention heads go, all at once in three ways or bit by bit, always from the same random weights and with as many
training steps in all:

- end: the whole model trains, then all at once;
- tuned: the whole model trains for 8/9 of the steps, then all at once, and the small model is tuned for the others;
- midway: all at once in the middle of a single training;
- gradual: `when="gradual"`, a schedule of widths over a single training.

    python recipes/gradual_pruning.py                # three seeds, some minutes on two cores
    python recipes/gradual_pruning.py --seeds 1 --steps 100
    python recipes/gradual_pruning.py --validate     # on other text: what the schedule was chosen by

No network, no other data and no pretrained model is needed.
"""

import argparse
import statistics
from collections.abc import Sequence

from datasets import Dataset
from missing_word import PARAGRAPHS, accuracy, make_classifier, make_data, train
from transformers.utils import logging

from hf_subprune import PruneConfig, prune
from hf_subprune.callback import SubpruneCallback
from hf_subprune.schedules import Schedule

RATE, TUNING_RATE = 3e-3, 1e-3
SCHEDULES = {"midway": Schedule("linear", end=0.5, steps=1), "gradual": Schedule()}
ONE_SHOT = ("end", "tuned", "midway")


def run(
    seed: int, steps: int, config: PruneConfig, training: Dataset, test: Dataset, vocabulary: int
) -> dict[str, dict[str, float]]:
    """Accuracy and parameters of the whole model, and with each way to prune.

    Args:
        seed: Of the weights and of the order of the samples.
        steps: Training steps that each way has in all.
        config: What to keep, the same for all ways.
        training: To train and calibrate on.
        test: To test on.
        vocabulary: Number of tokens.
    """
    results = {}

    def note(name: str, model: object) -> None:
        results[name] = {"accuracy": accuracy(model, test), "parameters": model.num_parameters()}

    model = train(make_classifier(vocabulary, seed), training, steps, RATE, seed)
    note("whole", model)
    prune(model, training, config)
    note("end", model)
    tuning = steps // 9
    model = train(make_classifier(vocabulary, seed), training, steps - tuning, RATE, seed)
    note("tuned", train(model, training, tuning, TUNING_RATE, seed, SubpruneCallback(config, when="begin")))
    for name, schedule in SCHEDULES.items():
        callback = SubpruneCallback(config, when="gradual", schedule=schedule)
        note(name, train(make_classifier(vocabulary, seed), training, steps, RATE, seed, callback))
    return results


def main(arguments: Sequence[str] | None = None) -> list[dict[str, dict[str, float]]]:
    """Run every seed; print a table of accuracies, and by how much gradual pruning is better, with the spread."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--steps", type=int, default=1800, help="training steps that each way has in all")
    parser.add_argument("--keep", type=float, default=0.5, help="fraction of neurons and heads to keep")
    parser.add_argument("--samples", type=int, default=256, help="samples to calibrate on")
    parser.add_argument("--paragraphs", type=int, default=PARAGRAPHS, help="of text, to train and to test on")
    parser.add_argument("--validate", action="store_true", help="test on text that is neither trained nor tested on")
    options = parser.parse_args(arguments)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    config = PruneConfig(keep=options.keep, samples=options.samples, held_out=max(1, options.samples // 4))
    training, test, tokenizer = make_data(options.paragraphs, validate=options.validate)
    print(f"{len(training)} gaps to train on, {len(test)} to test on")
    print("seed  " + "".join(f"{name:>10}" for name in ("whole", *ONE_SHOT, "gradual")))
    results = []
    for seed in range(options.seeds):
        found = run(seed, options.steps, config, training, test, len(tokenizer))
        results.append(found)
        print(f"{seed:<6}" + "".join(f"{row['accuracy']:10.4f}" for row in found.values()), flush=True)
    means = {name: statistics.mean(found[name]["accuracy"] for found in results) for name in results[0]}
    print("mean  " + "".join(f"{mean:10.4f}" for mean in means.values()))
    for name in ONE_SHOT:
        gains = [found["gradual"]["accuracy"] - found[name]["accuracy"] for found in results]
        spread = f", standard deviation over seeds {statistics.stdev(gains):.4f}" if len(gains) > 1 else ""
        print(f"gradual less {name}: {statistics.mean(gains):+.4f}{spread}")
    return results


if __name__ == "__main__":
    main()
