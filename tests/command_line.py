"""A tiny encoder with a tokenizer on disk, texts that it can read, and commands on them."""

from pathlib import Path

from tiny import tiny
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from hf_subprune.cli import app

WORDS = ["the", "cat", "sat", "on", "a", "mat", "while", "two", "dogs", "ran", "past", "it", "and", "nobody", "saw"]


def save_encoder(folder: Path) -> Path:
    """A tiny BERT with a tokenizer, saved."""
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tiny("bert").save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    return folder


def write_texts(path: Path) -> Path:
    path.write_text("\n".join(" ".join(WORDS[i % 7 : i % 7 + 5]) + f" {WORDS[i % 14]}" for i in range(40)))
    return path


def run(*words: object) -> str:
    """What a command prints."""
    result = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "160"})
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output
