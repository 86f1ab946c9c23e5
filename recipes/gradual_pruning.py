"""Gradual against one-shot pruning of a text classifier, at the same size and with the same training steps.

A classifier learns to tell which function word is missing from a sentence: of 15 words, with seven tokens on either
side, from the docstrings of the standard library, real text that every Python carries. Half of its MLP neurons and
attention heads go, in one of three ways:

- before: `when="begin"`, all at once, and the small model trains for all of the steps;
- after: the whole model trains for all of the steps (`whole`), then all at once;
- gradual: `when="gradual"`, a cubic schedule over the first steps, surgery at the end.

It is either a small BERT that was trained on the same task and trains on, or a pretrained encoder with a new head.
The small BERT has stopped, before that, where more training still makes it more accurate: later it only overfits. By
how much gradual pruning is better is printed with the spread of that difference over seeds, which the size of the test
data and the luck of each training make.

    python recipes/gradual_pruning.py                # three seeds, some minutes on two cores
    python recipes/gradual_pruning.py --pretrained --steps 200  # the encoder of hf_subprune[demo]
    python recipes/gradual_pruning.py --seeds 1 --steps 50 --original-steps 200
    python recipes/gradual_pruning.py --validate     # on other text, by which the settings were chosen

No network and no other data is needed.
"""

import argparse
import copy
import statistics
from collections.abc import Callable, Sequence

from datasets import Dataset
from missing_word import PARAGRAPHS, WORDS, accuracy, make_classifier, make_data, train
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, set_seed
from transformers.utils import logging

from hf_subprune import PruneConfig, prune
from hf_subprune.demo import demo_model_folder
from hf_subprune.training.callback import SubpruneCallback
from hf_subprune.training.schedules import Schedule

ONE_SHOT = ("before", "after")


def run(
    start: Callable[[int], PreTrainedModel],
    seed: int,
    steps: int,
    rate: float,
    config: PruneConfig,
    schedule: Schedule,
    training: Dataset,
    test: Dataset,
) -> dict[str, dict[str, float]]:
    """Accuracy and parameters after `steps` of training: of the whole model, and with each way to prune.

    Args:
        start: The model that all ways begin with, of a seed.
        seed: Of that model, and of the order of the samples.
        steps: Training steps that each way has.
        rate: Highest learning rate.
        config: What to keep, the same for all ways.
        schedule: Of gradual pruning.
        training: To train and calibrate on.
        test: To test on.
    """
    original, results = start(seed), {}

    def note(name: str, model: PreTrainedModel) -> None:
        results[name] = {"accuracy": accuracy(model, test), "parameters": model.num_parameters()}

    model = train(copy.deepcopy(original), training, steps, rate, seed)
    note("whole", model)
    begin = SubpruneCallback(config, when="begin")
    note("before", train(copy.deepcopy(original), training, steps, rate, seed, begin))
    prune(model, training, config)
    note("after", model)
    gradual = SubpruneCallback(config, when="gradual", schedule=schedule)
    note("gradual", train(original, training, steps, rate, seed, gradual))
    return results


def main(arguments: Sequence[str] | None = None) -> list[dict[str, dict[str, float]]]:
    """Run every seed; print a table of accuracies, and by how much gradual pruning is better, with the spread."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--steps", type=int, default=300, help="training steps that each way has")
    parser.add_argument("--original-steps", type=int, default=1600, help="training steps of the small BERT before")
    parser.add_argument(
        "--pretrained",
        nargs="?",
        const="",
        metavar="MODEL",
        help="begin with a pretrained encoder: a folder or a Hub id, or that of hf_subprune[demo] if left out",
    )
    parser.add_argument("--keep", type=float, default=0.5, help="fraction of neurons and heads to keep")
    parser.add_argument("--end", type=float, default=0.15, help="fraction of the steps at which the last units go")
    parser.add_argument("--samples", type=int, default=256, help="samples to calibrate on")
    parser.add_argument("--paragraphs", type=int, default=PARAGRAPHS, help="of text, to train and to test on")
    parser.add_argument("--validate", action="store_true", help="test on text that is neither trained nor tested on")
    options = parser.parse_args(arguments)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    held_out = max(1, options.samples // 4)
    # Training mends the residual stream: a step need not. The widths are the same for all.
    config = PruneConfig(
        keep=options.keep, budget="uniform", variant="layer", samples=options.samples, held_out=held_out
    )
    pretrained = None if options.pretrained is None else options.pretrained or str(demo_model_folder())
    tokenizer = AutoTokenizer.from_pretrained(pretrained) if pretrained else None
    training, test, tokenizer = make_data(options.paragraphs, options.validate, tokenizer)
    rate, schedule = 3e-4 if pretrained else 1e-3, Schedule(end=options.end)

    def start(seed: int) -> PreTrainedModel:
        if pretrained is None:
            return train(make_classifier(len(tokenizer), seed), training, options.original_steps, 3e-3, seed)
        set_seed(seed)  # of the head
        return AutoModelForSequenceClassification.from_pretrained(pretrained, num_labels=len(WORDS))

    print(f"{len(training)} gaps to train on, {len(test)} to test on")
    print("seed  " + "".join(f"{name:>10}" for name in ("whole", *ONE_SHOT, "gradual")))
    results = []
    for seed in range(options.seeds):
        found = run(start, seed, options.steps, rate, config, schedule, training, test)
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
