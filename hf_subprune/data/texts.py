"""Texts as people have them, plain, in conversations, as prompts with completions or in pairs, and their tokens."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel

from ..models.sizes import special_ids
from .features import Accepts, text_config

COMPLETIONS = (("prompt", "completion"), ("prompt", "response"), ("instruction", "output"))
"""Pairs of columns that make one text: what is asked, and what is answered."""
PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "context"),
    ("question", "sentence"),
    ("query", "passage"),
    ("text_a", "text_b"),
)
"""Pairs of columns that a tokenizer joins, with what it puts between two sentences."""

TRANSCRIPTS = ("text", "transcription", "transcript", "sentence", "caption")
"""Columns of what is said in a sound, or stands in an image."""

_ROLES = {"human": "user", "gpt": "assistant"}
# Part of the tokens that two tokenizers of one vocabulary number alike; the others were added.
_ALIKE = 0.9
# Of a text, so many characters for every token that is wanted are tokenized at first.
_CHARACTERS = 32


@dataclass(frozen=True)
class Written:
    """A text as it is tokenized.

    Args:
        text: What is written.
        second: The second sentence of a pair.
        special: Whether the tokenizer is to add its special tokens.
    """

    text: str
    second: str | None = None
    special: bool = True


@dataclass(frozen=True)
class TextColumns:
    """Where the text of a row stands.

    Args:
        names: Columns that must be there.
        written: From a row to its text; `None` where it is blank.
        plain: Whether it is one column of plain text.
        named: Whether the columns were found by their names or their form rather than as the only ones of strings.
    """

    names: frozenset[str]
    written: Callable[[Mapping[str, Any]], Written | None]
    plain: bool = False
    named: bool = True


def text_columns(row: Mapping[str, Any], accepts: Accepts, tokenizer: Any) -> TextColumns | None:
    """Find the text of rows like one: a column `"text"`, a conversation, `COMPLETIONS`, `PAIRS`, or the only strings.

    Args:
        row: Columns of a sample.
        accepts: Which of them are labels.
        tokenizer: With a chat template, for conversations.
    """
    strings = [name for name, value in row.items() if isinstance(value, str) and not accepts.is_label(name)]
    if "text" in strings:
        return _plain("text", named=True)
    completions = next((names for names in COMPLETIONS if set(names) <= row.keys()), None)
    if completions and all(_turns(row[name]) for name in completions):
        return TextColumns(frozenset(completions), _conversation(completions, tokenizer))
    conversations = [name for name, value in row.items() if _turns(value)]
    if len(conversations) == 1 or "messages" in conversations:
        name = "messages" if "messages" in conversations else conversations[0]
        return TextColumns(frozenset([name]), _conversation((name,), tokenizer))
    if completions and set(completions) <= set(strings):
        return TextColumns(frozenset(completions), _joined(*completions))
    pair = next((names for names in PAIRS if set(names) <= set(strings)), None)
    if pair is not None:
        return TextColumns(frozenset(pair), _paired(*pair))
    return _plain(strings[0], named=False) if len(strings) == 1 else None


def _plain(name: str, named: bool) -> TextColumns:
    def written(row: Mapping[str, Any]) -> Written | None:
        text = row[name]
        return Written(text) if isinstance(text, str) and text.strip() else None

    return TextColumns(frozenset([name]), written, plain=True, named=named)


def _joined(first: str, second: str) -> Callable[[Mapping[str, Any]], Written | None]:
    def written(row: Mapping[str, Any]) -> Written | None:
        prompt, answer = row[first], row[second]
        apart = prompt[-1:].isspace() or answer[:1].isspace()
        text = prompt + ("" if apart or not prompt else "\n") + answer
        return Written(text) if text.strip() else None

    return written


def _paired(first: str, second: str) -> Callable[[Mapping[str, Any]], Written | None]:
    def written(row: Mapping[str, Any]) -> Written | None:
        one, other = row[first], row[second]
        return Written(one, other) if one.strip() and other.strip() else None

    return written


def _turns(value: Any) -> list[dict[str, Any]]:
    """The turns of a conversation, `role` and `content` each; empty for anything else.

    Read as well: `from` and `value`, as ShareGPT has them, and a dict of two lists.
    """
    if isinstance(value, Mapping) and all(isinstance(entries, Sequence) for entries in value.values()):
        value = [dict(zip(value, entries, strict=True)) for entries in zip(*value.values(), strict=False)]
    if not isinstance(value, (list, tuple)) or not all(isinstance(turn, Mapping) for turn in value):
        return []
    turns = [
        {**turn, "role": _ROLES.get(turn["from"], turn["from"]), "content": turn["value"]}
        if {"from", "value"} <= turn.keys()
        else dict(turn)
        for turn in value
    ]
    return turns if all({"role", "content"} <= turn.keys() for turn in turns) else []


def _conversation(names: Sequence[str], tokenizer: Any) -> Callable[[Mapping[str, Any]], Written | None]:
    def written(row: Mapping[str, Any]) -> Written | None:
        turns = [turn for name in names for turn in _turns(row[name])]
        if not turns:
            return None
        if getattr(tokenizer, "chat_template", None) is None:
            raise ValueError(
                f"The data holds conversations (column {names[0]!r}), and {type(tokenizer).__name__} has no chat "
                "template to write them by: take the tokenizer of an instruction-tuned model, set its chat_template, "
                "or give plain texts."
            )
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        return Written(text, special=False) if text.strip() else None

    return written


def tokenize(tokenizer: Any, written: Written, longest: int) -> tuple[dict[str, list[int]], int]:
    """The columns that a tokenizer makes of a text, and how many of its tokens were left out, by estimate.

    Of a text that is much longer than wanted, no more than its beginning is tokenized.

    Args:
        tokenizer: The same afterwards.
        written: The text.
        longest: Most tokens of it.
    """
    given = [text for text in (written.text, written.second) if text is not None]
    size = _CHARACTERS * longest
    whole = max(map(len, given))
    options = {"add_special_tokens": written.special, "return_attention_mask": True, "verbose": False}
    with unchanged(tokenizer):
        while True:
            beginnings = [text[:size] for text in given]
            every = tokenizer(*beginnings, **options)
            found = len(every["input_ids"])
            if found >= longest or size >= whole:
                break
            size *= 4
        if found > longest:
            every = tokenizer(*beginnings, truncation=True, max_length=longest, **options)
    # Tokenizers truncate nothing where their special tokens alone are longer.
    columns = {name: value[:longest] for name, value in every.items()}
    tokens = found * sum(map(len, given)) / max(1, sum(map(len, beginnings)))
    return columns, max(0, round(tokens) - len(columns["input_ids"]))


@contextmanager
def unchanged(tokenizer: Any) -> Iterator[None]:
    """Within the context a tokenizer may be told to truncate or pad, which it would remember and save."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        yield
        return
    truncation, padding = backend.truncation, backend.padding
    try:
        yield
    finally:
        backend.no_truncation()
        backend.no_padding()
        if truncation is not None:
            backend.enable_truncation(**truncation)
        if padding is not None:
            backend.enable_padding(**padding)


def check_tokenizer(model: PreTrainedModel, tokenizer: Any) -> None:
    """Refuse a tokenizer that was made for another model, as far as can be told.

    Raises:
        ValueError: it was loaded from elsewhere, and where the model comes from there is one that numbers its tokens
            differently; or, where there is none, it has ordinary tokens at all places, two at least, where the model's
            config has special ones.
    """
    refused = f"{type(tokenizer).__name__} is not the tokenizer of {type(model).__name__}: "
    origin = model.name_or_path or ""
    if origin and origin == tokenizer.name_or_path:
        return
    own = _tokenizer_at(origin)
    if own is not None:
        mine, given = own.get_vocab(), tokenizer.get_vocab()
        if sum(mine.get(token) == number for token, number in given.items()) < _ALIKE * min(len(mine), len(given)):
            raise ValueError(f"{refused}the one at {origin} numbers its tokens differently. Load that one.")
        return
    places = {token for token in special_ids(text_config(model.config)) if 0 <= token < len(tokenizer)}
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    if len(places) > 1 and places.isdisjoint(special):
        named = ", ".join(f"{place} ({tokenizer.convert_ids_to_tokens(place)!r})" for place in sorted(places)[:3])
        raise ValueError(
            f"{refused}the model's config has special tokens at {named}, which are ordinary ones here. Load it from "
            "where the model comes from."
        )


def _tokenizer_at(origin: str) -> Any:
    """The tokenizer that was saved with a model, if it is at hand."""
    try:
        return AutoTokenizer.from_pretrained(origin, local_files_only=True) if origin else None
    except (OSError, ValueError):
        return None
