"""Prune, then fine-tune with LoRA: adapters on top of a pruned classifier, saved and loaded again beside it.

In this order: adapters must be merged before pruning. A small BERT learns which function word is missing from a
sentence (see missing_word.py), loses half of its neurons and heads, and gets low-rank adapters that train on labels
for a few steps. (`hf_subprune.recover(..., lora=True)` does without labels: it distils the original.)

    pip install 'hf_subprune[evaluate,lora]'
    python recipes/lora.py
"""

import argparse
import copy
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from missing_word import PARAGRAPHS, make_classifier, make_data, train
from peft import LoraConfig, PeftModel, get_peft_model
from tables import before_and_after, print_table
from transformers import AutoModelForSequenceClassification, PreTrainedModel
from transformers.utils import logging

from hf_subprune import PruneConfig, prune
from hf_subprune.evaluation.tasks import Classification, Trial


def save_and_reload(pruned: PreTrainedModel, adapted: PeftModel, folder: Path) -> PreTrainedModel:
    """The pruned model and its adapters in two folders, loaded again and merged."""
    pruned.save_pretrained(folder / "pruned")
    adapted.save_pretrained(folder / "adapters")
    base = AutoModelForSequenceClassification.from_pretrained(folder / "pruned")
    return PeftModel.from_pretrained(base, folder / "adapters").merge_and_unload().eval()


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Train, prune, train adapters, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=float, default=0.5, help="fraction of neurons and heads to keep")
    parser.add_argument("--rank", type=int, default=8, help="of the adapters")
    parser.add_argument("--steps", type=int, default=1200, help="training steps of the original")
    parser.add_argument("--lora-steps", type=int, default=300, help="training steps of the adapters")
    parser.add_argument("--paragraphs", type=int, default=PARAGRAPHS, help="of text, to train and to test on")
    parser.add_argument("--samples", type=int, default=256, help="samples to calibrate on")
    parser.add_argument("--test", type=int, default=1000, help="samples to test on")
    options = parser.parse_args(arguments)
    logging.disable_progress_bar()
    training, test, tokenizer = make_data(options.paragraphs)
    original = train(make_classifier(len(tokenizer), seed=0), training, options.steps, learning_rate=3e-3, seed=0)
    task = Classification(list(test.select(range(min(options.test, len(test))))), dataset="docstrings", batch_size=64)
    trial = Trial(task, original.eval())

    pruned = copy.deepcopy(original)
    prune(pruned, training, PruneConfig(keep=options.keep, samples=options.samples, held_out=options.samples // 4))
    lora = LoraConfig(task_type="SEQ_CLS", r=options.rank, lora_alpha=2 * options.rank, target_modules="all-linear")
    adapted = get_peft_model(copy.deepcopy(pruned), lora)
    trained, _ = adapted.get_nb_trainable_parameters()
    train(adapted, training, options.lora_steps, learning_rate=2e-3, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        recovered = save_and_reload(pruned, adapted, Path(folder))

    rows = []
    for name, model, tuned in (("pruned", pruned, 0), ("pruned, then LoRA", recovered, trained)):
        row = {"model": name, "parameters": model.num_parameters(), "trained": tuned}
        rows.append(row | before_and_after(trial, model))
    print_table("Which word is missing? With 95% intervals of the paired bootstrap", rows)
    return rows


if __name__ == "__main__":
    main()
