"""Rows of data one after the other to samples: of several kinds, with values missing, unreadable, or to be packed."""

import itertools
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import logging

from ..models.running import first_line
from .encoders import Encoders
from .features import Accepts, Sample, example_columns
from .packing import Packer
from .texts import check_tokenizer

logger = logging.get_logger(__name__)

Numbered = tuple[int, Any]
"""An item of the data, behind its number there."""

# Rows looked through for one without a missing value, to tell columns by, and for whether texts are long.
_HEAD = 16
# Windows that one text of a stream may fill, of data whose number of texts is not known.
_WINDOWS_A_TEXT = 4


class Rows:
    """Turns the rows of a data set into samples.

    Args:
        model: That the samples are for.
        accepts: What it takes.
        processing_class: Tokenizer, image processor, feature extractor or processor; not for processed data.
        longest: Tokens that a text is truncated to.
    """

    def __init__(self, model: PreTrainedModel, accepts: Accepts, processing_class: Any, longest: int) -> None:
        self.model, self.accepts, self.longest = model, accepts, longest
        self.tokenizer = getattr(processing_class, "tokenizer", processing_class)
        self.encoders = Encoders(accepts, processing_class, longest)

    def samples(
        self, items: Iterator[Numbered], *, packing: bool | str = False, most: int = 0, skip: bool = False
    ) -> Iterator[Sample | None]:
        """The samples in the order of the rows.

        Args:
            items: The data.
            packing: As in `PruneConfig`.
            most: Windows that one text may have to fill for there to be enough.
            skip: Whether samples that cannot be read are passed over.

        Yields:
            `None` for a row that is blank or lacks a value.

        Raises:
            ValueError, TypeError: as `data.reading.read`.
        """
        items = iter(items)
        head = list(itertools.islice(items, _HEAD))
        given = [item for _, item in head if item is not None]
        if not given:
            yield from (None for _ in head)
            return
        first = self.encoders.learn(next((item for item in given if _is_whole(item)), given[0]))
        if first.tokenizes:
            check_tokenizer(self.model, self.tokenizer)
        everything = itertools.chain(head, items)
        if self._packs(packing, head):
            packer = Packer(self.tokenizer, self.longest, max(most, _WINDOWS_A_TEXT))
            for number, item in everything:
                yield from self._read(number, lambda item=item: self._windows(packer, item), skip)
        else:
            for number, item in everything:
                yield from self._read(number, lambda item=item: [self._sample(item)], skip)

    def _packs(self, packing: bool | str, head: list[Numbered]) -> bool:
        """Whether texts are packed: `"auto"` does so where most of the first ones would be cut otherwise."""
        possible = self.accepts.causal and self.encoders.known[0].is_plain
        if packing == "auto":
            first = [sample for _, item in head for sample in self._readable(item)] if possible else []
            return 2 * sum(sample.cut > 0 for sample in first) > len(first)
        if packing and not possible:
            raise ValueError(
                f"packing=True joins plain texts for a causal language model; {self.accepts.architecture} is none, or "
                "the data is no plain text: leave packing out."
            )
        return bool(packing)

    def _readable(self, item: Any) -> list[Sample]:
        try:
            sample = self._sample(item)
        except Exception:  # it is told of when its turn comes
            return []
        return [] if sample is None else [sample]

    def _sample(self, item: Any) -> Sample | None:
        if item is None:
            return None
        row = example_columns(item)
        encoder = self.encoders.of(row)
        return None if encoder is None else encoder.encode(row)

    def _windows(self, packer: Packer, item: Any) -> Iterator[Sample | None]:
        row = example_columns(item) if item is not None else {}
        encoder = self.encoders.of(row)
        if encoder is None or not encoder.is_plain or encoder.text is None:
            yield None if encoder is None else encoder.encode(row)
            return
        written = encoder.text.written(row)
        if written is not None:
            yield from packer.add(written.text)

    def _read(self, number: int, read: Any, skip: bool) -> Iterator[Sample | None]:
        """What is made of one item; the error of one that cannot be read says which it is."""
        try:
            yield from read()
        except ImportError:  # a package is missing, whatever the sample
            raise
        except Exception as error:  # tokenizers and image processors raise what they like
            what = f"Sample {number} of the data cannot be read: {first_line(error)}"
            if not skip:
                kind = TypeError if type(error) is TypeError else ValueError
                raise kind(
                    f"{what} Mend it or leave it out; skip_unreadable=True passes over all such samples."
                ) from error
            logger.warning(f"{what} It is passed over.")


def _is_whole(item: Any) -> bool:
    return all(value is not None for value in example_columns(item).values())
