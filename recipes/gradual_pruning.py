"""Gradual against one-shot pruning of a text classifier, at the same size and with the same training steps.

A small BERT learns to tell the topic of paragraphs from the standard library's docstrings: real text that every
Python carries. The trained classifier is then pruned to half of its MLP neurons and attention heads in two ways, and
both train on for the same number of steps:

- one-shot: `when="begin"`, all units at once, then training;
- gradual: `when="gradual"`, a cubic schedule over the first part of the training, surgery at the end.

    python recipes/gradual_pruning.py                # three seeds, some minutes on two cores
    python recipes/gradual_pruning.py --seeds 1 --steps 50

No network, no other data and no pretrained model is needed.
"""

import argparse
import ast
import copy
import hashlib
import statistics
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from datasets import Dataset
from tokenizers import BertWordPieceTokenizer
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertTokenizerFast,
    DataCollatorWithPadding,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from hf_subprune.callback import SubpruneCallback
from hf_subprune.config import PruneConfig
from hf_subprune.schedules import Schedule

TOPICS = {
    "network": "asyncio email ftplib http imaplib ipaddress mailbox poplib selectors smtplib socket socketserver ssl "
    "urllib wsgiref xmlrpc",
    "numbers": "_pydatetime _pydecimal calendar datetime decimal fractions numbers random statistics turtle",
    "tooling": "ast bdb cProfile dis doctest importlib inspect logging pdb profile pstats pydoc trace traceback "
    "typing unittest",
    "files": "_pyio codecs csv encodings fileinput glob gzip lzma os pathlib shutil stat tarfile tempfile zipfile",
    "parallel": "_threading_local concurrent multiprocessing queue sched subprocess threading",
}
MAX_LENGTH = 32
# A large part to test on: there is little text, and differences of a per cent are to be seen.
TEST_FRACTION = 0.4


def labelled_paragraphs() -> tuple[list[str], list[int]]:
    """Distinct paragraphs of docstrings and the index of their topic, in one fixed order that mixes the modules."""
    root = Path(sysconfig.get_path("stdlib"))
    found: dict[str, int] = {}
    for label, modules in enumerate(TOPICS.values()):
        for module in modules.split():
            for path in [root / f"{module}.py", *(root / module).rglob("*.py")]:
                if path.is_file() and not {"test", "tests"} & set(path.relative_to(root).parts):
                    found.update(dict.fromkeys(paragraphs(path), label))
    texts = sorted(found, key=lambda text: hashlib.sha256(text.encode()).digest())
    return texts, [found[text] for text in texts]


def paragraphs(path: Path) -> list[str]:
    """The paragraphs of a module's docstrings, examples left out. The module is parsed, not imported."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = (node for node in ast.walk(ast.parse(path.read_bytes())) if isinstance(node, documented))
    texts = (" ".join(text.split()) for node in nodes for text in (ast.get_docstring(node) or "").split("\n\n"))
    return [text for text in texts if 40 <= len(text) <= 600 and ">>>" not in text]


def make_tokenizer(texts: Sequence[str]) -> BertTokenizerFast:
    """A WordPiece tokenizer trained on the texts."""
    trained = BertWordPieceTokenizer(lowercase=True)
    trained.train_from_iterator(texts, vocab_size=3000, min_frequency=2, show_progress=False)
    return BertTokenizerFast(tokenizer_object=trained._tokenizer, model_max_length=MAX_LENGTH)


def make_classifier(vocabulary: int, seed: int) -> BertForSequenceClassification:
    """Two layers of four heads and 256 neurons each, at random."""
    set_seed(seed)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=vocabulary,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=256,
            max_position_embeddings=MAX_LENGTH,
            num_labels=len(TOPICS),
        )
    )


def train(
    model: BertForSequenceClassification,
    data: Dataset,
    tokenizer: BertTokenizerFast,
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
            report_to=[],
            disable_tqdm=True,
            logging_strategy="no",
            use_cpu=True,
        )
        trainer = Trainer(
            model,
            arguments,
            train_dataset=data,
            processing_class=tokenizer,
            data_collator=DataCollatorWithPadding(tokenizer),
        )
        trainer.remove_callback(PrinterCallback)
        if callback is not None:
            callback.attach(trainer)
        trainer.train()
    return model


def accuracy(model: BertForSequenceClassification, data: Dataset, tokenizer: BertTokenizerFast) -> float:
    """Fraction of the samples whose topic the model finds."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, per_device_eval_batch_size=64, report_to=[], disable_tqdm=True, use_cpu=True
        )
        trainer = Trainer(
            model, arguments, processing_class=tokenizer, data_collator=DataCollatorWithPadding(tokenizer)
        )
        predicted = trainer.predict(data)
    return float((np.argmax(predicted.predictions, axis=-1) == predicted.label_ids).mean())


def run(seed: int, steps: int, pretraining_steps: int, config: PruneConfig, limit: int | None) -> dict[str, float]:
    """Accuracy of the classifier as trained, and pruned in both ways; parameters as a fraction of the original's.

    Args:
        seed: Of the weights and of the order of the samples.
        steps: Training steps of each pruned model.
        pretraining_steps: Training steps of the classifier that is pruned.
        config: What to keep; the same for both.
        limit: Paragraphs to use at most.
    """
    texts, labels = (values[:limit] for values in labelled_paragraphs())
    split = int(len(texts) * (1 - TEST_FRACTION))
    tokenizer = make_tokenizer(texts[:split])
    data = Dataset.from_dict({**tokenizer(texts, truncation=True), "labels": labels})
    training, test = data.select(range(split)), data.select(range(split, len(texts)))

    original = train(make_classifier(len(tokenizer), seed), training, tokenizer, pretraining_steps, 1e-3, seed)
    results = {"original": accuracy(original, test, tokenizer)}
    for name, callback in (
        ("one-shot", SubpruneCallback(config, when="begin")),
        ("gradual", SubpruneCallback(config, when="gradual", schedule=Schedule(steps=5, end=0.5))),
    ):
        model = train(copy.deepcopy(original), training, tokenizer, steps, 5e-4, seed, callback)
        results[name] = accuracy(model, test, tokenizer)
        results[f"{name} size"] = model.num_parameters() / original.num_parameters()
    return results


def main(arguments: Sequence[str] | None = None) -> list[dict[str, float]]:
    """Run every seed and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--steps", type=int, default=150, help="training steps of each pruned model")
    parser.add_argument("--pretraining-steps", type=int, default=250, help="training steps of the original")
    parser.add_argument("--keep", type=float, default=0.5, help="fraction of neurons and heads to keep")
    parser.add_argument("--samples", type=int, default=128, help="samples to calibrate on")
    parser.add_argument("--limit", type=int, default=None, help="paragraphs to use at most")
    options = parser.parse_args(arguments)
    logging.set_verbosity_error()
    config = PruneConfig(keep=options.keep, samples=options.samples, held_out=max(1, options.samples // 4))
    results = []
    print("seed  original  one-shot   gradual   size")
    for seed in range(options.seeds):
        found = run(seed, options.steps, options.pretraining_steps, config, options.limit)
        results.append(found)
        accuracies = "".join(f"{found[name]:10.4f}" for name in ("original", "one-shot", "gradual"))
        print(f"{seed:4d}{accuracies}   {found['gradual size']:.3f}", flush=True)
    means = (statistics.mean(found[name] for found in results) for name in ("original", "one-shot", "gradual"))
    print("mean" + "".join(f"{mean:10.4f}" for mean in means))
    return results


if __name__ == "__main__":
    main()
