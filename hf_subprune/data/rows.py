"""Rows of data one after the other to samples: of several kinds, with values missing, unreadable, or to be packed."""

import itertools
from collections.abc import Iterable, Iterator
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
        self,
        items: Iterator[Numbered],
        *,
        packing: bool | str = False,
        wanted: int = 0,
        most: int = 0,
        skip: bool = False,
    ) -> Iterator[Sample | None]:
        """The samples in the order of the rows.

        Args:
            items: The data.
            packing: As in `PruneConfig`.
            wanted: Samples that are asked for, which packing has to give if it is `"auto"` and texts are short.
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
        if not self._packs(packing):
            yield from self._each(everything, skip)
        elif packing is True or self._are_long(head):
            yield from self._packed(everything, most, skip)
        else:
            yield from self._packed_where_enough(everything, wanted, most, skip)

    def _packs(self, packing: bool | str) -> bool:
        possible = self.accepts.causal and self.encoders.known[0].is_plain
        if packing is True and not possible:
            raise ValueError(
                f"packing=True joins plain texts for a causal language model; {self.accepts.architecture} is none, or "
                "the data is no plain text: leave packing out."
            )
        return possible and packing is not False

    def _are_long(self, head: list[Numbered]) -> bool:
        """Whether most of the first texts would be cut."""
        first = [sample for _, item in head for sample in self._readable(item)]
        return 2 * sum(sample.cut > 0 for sample in first) > len(first)

    def _each(self, items: Iterable[Numbered], skip: bool) -> Iterator[Sample | None]:
        for number, item in items:
            yield from self._read(number, lambda item=item: [self._sample(item)], skip)

    def _packed(self, items: Iterable[Numbered], most: int, skip: bool) -> Iterator[Sample | None]:
        packer = Packer(self.tokenizer, self.longest, max(most, _WINDOWS_A_TEXT))
        for number, item in items:
            yield from self._read(number, lambda item=item: self._windows(packer, item), skip)

    def _packed_where_enough(
        self, items: Iterable[Numbered], wanted: int, most: int, skip: bool
    ) -> Iterator[Sample | None]:
        """Windows, if the texts fill as many as are wanted; a sample for each text, if there are too few for that."""
        taken: list[Numbered] = []
        windows = filter(None, self._packed(_noted(items, taken), most, skip))
        first = list(itertools.islice(windows, wanted))
        yield from itertools.chain(first, windows) if len(first) == wanted else self._each(taken, skip)

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


def _noted(items: Iterable[Numbered], taken: list[Numbered]) -> Iterator[Numbered]:
    for item in items:
        taken.append(item)
        yield item


def _is_whole(item: Any) -> bool:
    return all(value is not None for value in example_columns(item).values())
