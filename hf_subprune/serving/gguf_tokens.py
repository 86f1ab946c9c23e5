"""The tokenizer of a model as GGUF holds it: tokens, merges, special ones, and how text is split before merges."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

if TYPE_CHECKING:
    from gguf import GGUFReader, GGUFWriter

_LIKE = "Give a GGUF file of the original model, whose tokenizer is then taken over: --like ORIGINAL.gguf"

_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
_THREE_DIGITS, _ONE_DIGIT = _CONTRACTIONS + _WORDS % r"\p{N}{1,3}", _CONTRACTIONS + _WORDS % r"\p{N}"
_BYTES = ("bytes", True)

_NAMES: dict[tuple[tuple[tuple[str, Any], ...], bool], str] = {
    ((_BYTES,), False): "gpt-2",
    ((("digits", True), _BYTES), False): "smollm",
    ((("split", _THREE_DIGITS), ("bytes", False)), True): "llama-bpe",
    ((("split", _THREE_DIGITS), ("bytes", False)), False): "dbrx",
    ((("split", _ONE_DIGIT), ("bytes", False)), False): "qwen2",
}
"""What llama.cpp calls the ways to split text that tokenizer.json describes: steps, and whether words that are tokens
themselves are not merged anew."""


def add_tokenizer(writer: GGUFWriter, source: str | Path, rows: int) -> None:
    """Write the byte-level BPE tokenizer that is saved with a model.

    Args:
        writer: Of the GGUF file.
        source: Local folder or Hub id of the model.
        rows: Of its embedding; those behind the last token are marked as unused.

    Raises:
        ValueError: there is no tokenizer, or one that llama.cpp has no name for; the message says what is in the way.
    """
    import gguf

    tokenizer = _load(source)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        file = Path(folder) / "tokenizer.json"
        if not file.is_file():
            raise ValueError(f"The tokenizer of {source} ({type(tokenizer).__name__}) has no tokenizer.json. {_LIKE}")
        described = json.loads(file.read_text(encoding="utf-8"))
        name = splitting_name(described)
        special = gguf.SpecialVocab(folder, load_merges=True, n_vocab=rows)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    tokens, types = _tokens(described, rows)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    special.add_special_token.update(_added(tokenizer))
    special.add_to_gguf(writer, quiet=True)


def add_tokenizer_of(writer: GGUFWriter, reader: GGUFReader, rows: int) -> None:
    """Write the tokenizer, chat template and description of another GGUF file.

    Args:
        writer: Of the GGUF file.
        reader: Of a GGUF file of the original model.
        rows: Of the embedding.

    Raises:
        ValueError: the file has no tokens, or more of them than the embedding has rows, or fewer.
    """
    tokens = reader.get_field("tokenizer.ggml.tokens")
    if tokens is None or len(tokens.data) != rows:
        found = "no tokens" if tokens is None else f"{len(tokens.data)} tokens"
        raise ValueError(f"The file given with --like has {found}, this model has {rows}: take one of its original")
    kept = ("tokenizer.", "general.license", "general.languages", "general.basename", "general.organization")
    for key, field in reader.fields.items():
        if key.startswith(kept):
            writer.add_key_value(key, field.contents(), field.types[0], field.types[-1] if field.types[1:] else None)


def splitting_name(described: dict[str, Any]) -> str:
    """What llama.cpp calls the way in which a tokenizer splits text.

    Args:
        described: What tokenizer.json holds.

    Raises:
        ValueError: the tokenizer is no byte-level BPE, or splits or changes text in a way that is not known here.
    """
    model, normalizer = described.get("model", {}), described.get("normalizer") or {}
    if (
        model.get("type") != "BPE"
        or model.get("byte_fallback")
        or (described.get("decoder") or {}).get("type") != ("ByteLevel")
    ):
        raise ValueError(f"Its tokenizer is no byte-level BPE, the one kind that is written out here. {_LIKE}")
    if normalizer.get("type", "NFC") != "NFC":
        raise ValueError(f"Its tokenizer changes text ({normalizer['type']}), which llama.cpp does not. {_LIKE}")
    steps = tuple(_steps(described.get("pre_tokenizer") or {}))
    name = _NAMES.get((steps, bool(model.get("ignore_merges"))))
    if name is None:
        raise ValueError(f"Its tokenizer splits text in a way ({steps}) whose name in llama.cpp is unknown. {_LIKE}")
    return name


def _load(source: str | Path) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(f"No tokenizer is saved with {source} ({error}). Save it there, or: {_LIKE}") from error


def _steps(described: dict[str, Any]) -> Iterable[tuple[str, Any]]:
    """The steps of a pre-tokenizer, without what is the same in all of them."""
    kind = described.get("type")
    if kind == "Sequence":
        for step in described["pretokenizers"]:
            yield from _steps(step)
    elif kind == "ByteLevel":
        yield ("bytes with a blank in front" if described.get("add_prefix_space") else "bytes"), described["use_regex"]
    elif kind == "Digits":
        yield "digits", described["individual_digits"]
    elif kind == "Split" and described["behavior"] == "Isolated" and not described["invert"]:
        yield "split", described["pattern"].get("Regex", described["pattern"])
    else:
        yield str(kind), json.dumps(described, sort_keys=True)


def _tokens(described: dict[str, Any], rows: int) -> tuple[list[str], list[int]]:
    """Text and type of every row of the embedding."""
    from gguf import TokenType

    tokens = [f"[PAD{number}]" for number in range(rows)]
    types = [int(TokenType.UNUSED)] * rows
    for text, number in described["model"]["vocab"].items():
        tokens[number], types[number] = text, int(TokenType.NORMAL)
    for added in described.get("added_tokens", ()):
        if added["id"] < rows:
            tokens[added["id"]] = added["content"]
            types[added["id"]] = int(TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED)
    return tokens, types


def _added(tokenizer: PreTrainedTokenizerBase) -> dict[str, bool]:
    """Which special tokens stand around a text, by what the tokenizer does."""
    around = tokenizer("a")["input_ids"]
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    return {
        "bos": len(around) > len(plain) and around[0] == tokenizer.bos_token_id,
        "eos": len(around) > len(plain) and around[-1] == tokenizer.eos_token_id,
    }
