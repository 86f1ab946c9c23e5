"""A task with real text for the recipes that train: which function word is missing from a sentence?

Of 15 words, with seven tokens on either side, from the docstrings of the standard library, which every Python carries.
No network, no other data and no pretrained model is needed.
"""

import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
from datasets import Dataset
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_subprune.demo import docstrings
from hf_subprune.training.callback import SubpruneCallback

WORDS = ["a", "an", "and", "as", "by", "for", "from", "if", "in", "is", "of", "or", "the", "to", "with"]
VOCABULARY = 3000
CONTEXT = 7  # tokens on either side of the missing word
PARAGRAPHS = 3000  # of which the last third is to test on


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


def make_data(
    paragraphs: int, validate: bool = False, tokenizer: PreTrainedTokenizerFast | None = None
) -> tuple[Dataset, Dataset, PreTrainedTokenizerFast]:
    """Data to train on, data to test on from other paragraphs, and the tokenizer.

    Args:
        paragraphs: Two thirds to train on and one third to test on.
        validate: Test on paragraphs beyond those instead, to choose settings by.
        tokenizer: Of a pretrained model; made of the text to train on if left out.
    """
    texts = docstrings(paragraphs)
    split = 2 * paragraphs // 3
    unseen = docstrings(split // 3, offset=paragraphs) if validate else texts[split:]
    tokenizer = tokenizer or make_tokenizer(texts[:split])
    training, test = (
        Dataset.from_list(list(gaps(part, tokenizer))).shuffle(seed=0) for part in (texts[:split], unseen)
    )
    return training, test, tokenizer


def make_classifier(vocabulary: int, seed: int) -> BertForSequenceClassification:
    """Two layers of eight heads and 128 neurons each, at random."""
    set_seed(seed)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=vocabulary,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=8,
            intermediate_size=128,
            max_position_embeddings=2 * CONTEXT + 2,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            num_labels=len(WORDS),
        )
    )


def train(
    model: PreTrainedModel,
    data: Dataset,
    steps: int,
    learning_rate: float,
    seed: int,
    callback: SubpruneCallback | None = None,
) -> PreTrainedModel:
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


def accuracy(model: PreTrainedModel, data: Dataset) -> float:
    """Fraction of the gaps whose word the model finds."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(folder, per_device_eval_batch_size=128, report_to=[], disable_tqdm=True)
        predicted = Trainer(model, arguments).predict(data)
    return float((np.argmax(predicted.predictions, axis=-1) == predicted.label_ids).mean())
