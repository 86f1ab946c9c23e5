"""Plain texts one behind the other, cut into windows without padding."""

import itertools
from collections.abc import Iterator
from typing import Any

import torch

from .features import Sample
from .texts import unchanged

# Of a text, as many characters are tokenized at a time, so that a long one takes no memory to speak of.
_PIECE = 2**16


class Packer:
    """Joins texts and cuts what they make together into windows of one length.

    Every window begins as the tokenizer begins a text (a language model may depend on that token), and every text ends
    with the token of its end.

    Args:
        tokenizer: The same afterwards.
        length: Tokens of a window.
        most: Windows that one text may fill, so that a long one does not stand for all.
    """

    def __init__(self, tokenizer: Any, length: int, most: int) -> None:
        self.tokenizer, self.length, self.most = tokenizer, length, most
        self.start, self.end = _around(tokenizer)
        self._tokens: list[int] = []

    def add(self, text: str) -> Iterator[Sample]:
        """The windows that a further text fills up."""
        left = self.most * self._room
        for begin in range(0, len(text), _PIECE):
            ids = _bare(self.tokenizer, text[begin : begin + _PIECE])[:left]
            left -= len(ids)
            self._tokens += ids
            yield from self._full()
            if left == 0:
                break
        self._tokens += self.end
        yield from self._full()

    @property
    def _room(self) -> int:
        return self.length - len(self.start)

    def _full(self) -> Iterator[Sample]:
        while len(self._tokens) >= self._room:
            window, self._tokens = self._tokens[: self._room], self._tokens[self._room :]
            ids = torch.tensor(self.start + window)
            yield Sample({"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def _bare(tokenizer: Any, text: str) -> list[int]:
    with unchanged(tokenizer):
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What a tokenizer puts before a text and, where it puts nothing behind it, the token that ends one."""
    with unchanged(tokenizer):
        whole = tokenizer("a", return_special_tokens_mask=True, verbose=False)
    ids, special = whole["input_ids"], whole["special_tokens_mask"]
    start = [token for token, _ in itertools.takewhile(lambda pair: pair[1], zip(ids, special, strict=True))]
    end = [token for token, added in zip(ids, special, strict=True) if added][len(start) :]
    if not end and tokenizer.eos_token_id is not None:
        end = [tokenizer.eos_token_id]
    return start, end
