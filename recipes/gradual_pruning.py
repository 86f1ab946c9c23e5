"""Gradual against one-shot pruning of a text classifier, at the same size and with the same training steps.

A small BERT learns to tell which function word is missing from a sentence: of 15 words, with seven tokens on either
side, from the docstrings of the standard library, real text that every Python carries. The trained classifier then
trains on for some steps in which half of its MLP neurons and attention heads go, in one of three ways:

- before: `when="begin"`, all at once, and the small model trains for all of the steps;
- after: `when="end"`, the whole model trains for all of the steps, then all at once;
- gradual: `when="gradual"`, a cubic schedule over the first half of the steps, surgery at the end.

    python recipes/gradual_pruning.py                # three seeds, some minutes on two cores
    python recipes/gradual_pruning.py --seeds 1 --steps 50 --original-steps 200

No network, no other data and no pretrained model is needed.
"""

import argparse
import copy
import statistics
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
from datasets import Dataset
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from hf_subprune.callback import SubpruneCallback
from hf_subprune.config import PruneConfig
from hf_subprune.demo import docstrings
from hf_subprune.schedules import Schedule

WORDS = ["a", "an", "and", "as", "by", "for", "from", "if", "in", "is", "of", "or", "the", "to", "with"]
VOCABULARY = 3000
CONTEXT = 7  # tokens on either side of the missing word
PARAGRAPHS = 3000  # of which the last third is to test on
WAYS = {
    "before": {"when": "begin"},
    "after": {"when": "end"},
    "gradual": {"when": "gradual", "schedule": Schedule("cubic", end=0.5, steps=4)},
}


def make_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are the most frequent words of the texts, the same ones in every run."""
    normalizer, splitter = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    counts = Counter(word for text in texts for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text)))
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[MASK]", *(word for word, _ in counts.most_common(VOCABULARY))]
    words = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="[UNK]"))
    words.normalizer, words.pre_tokenizer = normalizer, splitter
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", mask_token="[MASK]"
    )


def gaps(texts: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> Iterator[dict[str, object]]:
    """Every place where one of the words stands: the tokens around it, the word masked, and which one it was."""
    labels = {tokenizer.convert_tokens_to_ids(word): label for label, word in enumerate(WORDS)}
    pad = [tokenizer.pad_token_id] * CONTEXT
    for tokens in tokenizer(list(texts), add_special_tokens=False)["input_ids"]:
        padded = pad + tokens + pad
        for place, token in enumerate(tokens, CONTEXT):
            if token in labels:
                left, right = padded[place - CONTEXT : place], padded[place + 1 : place + 1 + CONTEXT]
                ids = [tokenizer.cls_token_id, *left, tokenizer.mask_token_id, *right]
                mask = [int(i != tokenizer.pad_token_id) for i in ids]
                yield {"input_ids": ids, "attention_mask": mask, "labels": labels[token]}


def make_data(paragraphs: int) -> tuple[Dataset, Dataset, PreTrainedTokenizerFast]:
    """Data to train on, data to test on from other paragraphs, and the tokenizer."""
    texts = docstrings(paragraphs)
    split = 2 * paragraphs // 3
    tokenizer = make_tokenizer(texts[:split])
    training, test = (
        Dataset.from_list(list(gaps(part, tokenizer))).shuffle(seed=0) for part in (texts[:split], texts[split:])
    )
    return training, test, tokenizer


def make_classifier(vocabulary: int, seed: int) -> BertForSequenceClassification:
    """Two layers of four heads and 128 neurons each, at random."""
    set_seed(seed)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=vocabulary,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=128,
            max_position_embeddings=2 * CONTEXT + 2,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            num_labels=len(WORDS),
        )
    )


def train(
    model: BertForSequenceClassification,
    data: Dataset,
    steps: int,
    learning_rate: float,
    seed: int,
    callback: SubpruneCallback | None = None,
) -> BertForSequenceClassification:
    """Train for so many steps with `Trainer`, and with the callback attached."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=32,
            learning_rate=learning_rate,
            warmup_steps=steps // 10,
            weight_decay=0.01,
            seed=seed,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = Trainer(model, arguments, train_dataset=data)
        trainer.remove_callback(PrinterCallback)
        if callback is not None:
            callback.attach(trainer)
        trainer.train()
    return model


def accuracy(model: BertForSequenceClassification, data: Dataset) -> float:
    """Fraction of the gaps whose word the model finds."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(folder, per_device_eval_batch_size=128, report_to=[], disable_tqdm=True)
        predicted = Trainer(model, arguments).predict(data)
    return float((np.argmax(predicted.predictions, axis=-1) == predicted.label_ids).mean())


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
    """Run every seed and print a table of accuracies."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--steps", type=int, default=300, help="training steps that each way has")
    parser.add_argument("--original-steps", type=int, default=1200, help="training steps of the original")
    parser.add_argument("--keep", type=float, default=0.5, help="fraction of neurons and heads to keep")
    parser.add_argument("--samples", type=int, default=256, help="samples to calibrate on")
    parser.add_argument("--paragraphs", type=int, default=PARAGRAPHS, help="of text, to train and to test on")
    options = parser.parse_args(arguments)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    config = PruneConfig(keep=options.keep, samples=options.samples, held_out=max(1, options.samples // 4))
    training, test, tokenizer = make_data(options.paragraphs)
    print(f"{len(training)} gaps to train on, {len(test)} to test on")
    print("seed  " + "".join(f"{name:>10}" for name in ("original", *WAYS)))
    results = []
    for seed in range(options.seeds):
        found = run(seed, options.steps, options.original_steps, config, training, test, len(tokenizer))
        results.append(found)
        print(f"{seed:<6}" + "".join(f"{row['accuracy']:10.4f}" for row in found.values()), flush=True)
    means = {name: statistics.mean(found[name]["accuracy"] for found in results) for name in results[0]}
    print("mean  " + "".join(f"{mean:10.4f}" for mean in means.values()))
    return results


if __name__ == "__main__":
    main()
