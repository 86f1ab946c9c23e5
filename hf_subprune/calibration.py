"""Unlabeled data to calibration batches: read, tokenize, split, pad; and which rows of a batch are real tokens."""

import itertools
import time
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from huggingface_hub.utils import httpx
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from .config import PruneConfig
from .decoding import add_decoder_inputs
from .features import Features, example_columns, is_label, is_ready, make_encoder, text_config
from .padding import token_mask
from .processes import own_share

logger = logging.get_logger(__name__)

Batch = dict[str, torch.Tensor]

# Tries of a source that fails in a row, and seconds before the second one; each further wait is twice as long.
_ATTEMPTS = 4
_FIRST_WAIT = 1.0

# Rows looked through for one without a missing value, to tell columns by.
_HEAD = 16


# Tokens of a text that are enough to see what depends on what.
_PROBE_TOKENS = 32
# Ready batches that are read, however many samples they hold, where they cannot be cut: for two folds and to hold out.
_FEWEST_UNCUT = 3


@dataclass(frozen=True, eq=False)
class CalibrationSet:
    """Batches of forward arguments, without labels.

    Args:
        fit: Batches to fit on, at least two when there are two samples. The two folds of cross-fitting are the even
            and the odd ones.
        held_out: Batches, never fitted on, to measure the output's drift on.
        fit_samples: Samples in `fit`.
        held_out_samples: Samples in `held_out`.
        source: What the data was, in words.
        model: The model the batches are for; it knows which consumers lie in a decoder or an image tower.
    """

    fit: list[Batch]
    held_out: list[Batch]
    fit_samples: int
    held_out_samples: int
    source: str
    model: PreTrainedModel = field(repr=False)

    @property
    def probe(self) -> Batch:
        """Two samples to fit on (all of the first batch where its tensors cannot be cut), texts without their ends.

        Discovery holds what every layer makes of it at once.
        """
        first = self.fit[0]
        if not is_divisible(first):
            return first
        two = {name: value[:2] for name, value in first.items()}
        shapes, mask = {value.shape for value in two.values()}, two.get("attention_mask")
        if "input_ids" in two and len(shapes) == 1 and (mask is None or bool(mask[:, 0].all())):
            return {name: value[:, :_PROBE_TOKENS] for name, value in two.items()}
        return two

    def in_batches_of(self, size: int) -> "CalibrationSet":
        """The same samples, batches cut into ones of at most `size` samples; the folds stay as they are, or nearly.

        Batches whose tensors cannot be cut stay whole.
        """
        even, odd = ([piece for batch in self.fit[fold::2] for piece in _pieces(batch, size)] for fold in range(2))
        pairs = itertools.zip_longest(even, odd)
        fit = [batch for pair in pairs for batch in pair if batch is not None]
        return replace(self, fit=fit, held_out=[piece for batch in self.held_out for piece in _pieces(batch, size)])

    @property
    def own_held_out(self) -> list[Batch]:
        """The held-out batches that fall to this process, when several share them."""
        return [self.held_out[number] for number in own_share(len(self.held_out))]

    @property
    def description(self) -> dict[str, Any]:
        """The data in plain JSON types: where it came from, its samples, and its tokens where it has any."""
        return {
            "source": self.source,
            "fit_samples": self.fit_samples,
            "held_out_samples": self.held_out_samples,
            "fit_tokens": _tokens(self.fit),
            "held_out_tokens": _tokens(self.held_out),
        }

    def mask(self, shape: Sequence[int], index: int, consumer: str) -> torch.Tensor | None:
        """Which rows of a consumer's input are real tokens.

        Args:
            shape: `(batch, length, n)`, `(length, batch, n)` or `(rows, n)`.
            index: Of the batch that ran, the held-out ones counted behind those to fit on.
            consumer: Dotted path of the consumer.

        Returns:
            `(rows,)` bool, false at padding; `None` when every row counts.
        """
        batch = self.fit[index] if index < len(self.fit) else self.held_out[index - len(self.fit)]
        return token_mask(self.model, consumer, batch, shape)

    def rows(self, x: torch.Tensor, index: int, consumer: str) -> torch.Tensor:
        """The real tokens of a consumer's input or output `(..., n)`, as `(tokens, n)`: see `mask`."""
        mask = self.mask(x.shape, index, consumer)
        flat = x.reshape(-1, x.shape[-1])
        return flat if mask is None else flat[mask.to(flat.device)]


def prepare(model: PreTrainedModel, data: Any, config: PruneConfig, processing_class: Any = None) -> CalibrationSet:
    """Read `config.samples + config.held_out` samples and batch them for the model.

    Data with a length is sampled without replacement, streams are shuffled through a buffer of as many samples as
    are read, other iterables and ready batches are read in order. Blank texts are passed over. Samples are sorted by
    length and padded on the right to the longest of their batch, whatever the tokenizer's padding side is: without
    `position_ids` only then are a token's positions those it has alone. Waveforms are cut to the shortest instead.
    Columns with labels are dropped, so that no loss is computed. Encoder-decoder models without decoder inputs get
    the text shifted right where both sides share a vocabulary, or what the model generates (speech, images).

    Args:
        model: Any pretrained model; not changed.
        data: A `datasets.Dataset` or `IterableDataset` (text, image or audio column, or already tokenized), or a
            pandas `DataFrame` of such columns; a list of strings, images or waveforms; or ready batches (dicts of
            tensors).
        config: `samples`, `held_out`, `max_length`, `batch_size`, `shrinkage` and `seed` are read.
        processing_class: Tokenizer, image processor, feature extractor or processor; not for processed data.

    Raises:
        ValueError: the data is empty or too short, has no fitting column, lacks its processing class, or holds token
            ids that the model has no embedding for.
        TypeError: the data is of a kind not listed above.
    """
    items, ready = _opened(model, data, config)
    wanted = config.samples + config.held_out
    if ready:
        fit, held_out, counts = _split_ready(_read_ready(items, model, wanted), config)
    else:
        samples = _read_samples(model, items, processing_class, config, wanted)
        counts = _counts(len(samples), config)
        pad_id = _pad_id(model, processing_class)
        fit = [_collate(group, pad_id) for group in _groups(samples[: counts[0]], config.batch_size, folds=2)]
        held_out = [_collate(group, pad_id) for group in _groups(samples[counts[0] : sum(counts)], config.batch_size)]
    for batch in fit + held_out:
        _complete(model, batch)
    return CalibrationSet(fit, held_out, *counts, source=_describe(data), model=model)


def batch_some(model: PreTrainedModel, data: Any, config: PruneConfig, processing_class: Any = None) -> list[Batch]:
    """Batches of `config.samples` samples, or of all that there are: to compare models on, none is set aside.

    Args:
        model: As in `prepare`.
        data: As in `prepare`.
        config: `samples`, `max_length`, `batch_size` and `seed` are read.
        processing_class: As in `prepare`.

    Raises:
        ValueError, TypeError: as in `prepare`, but one sample is enough.
    """
    items, ready = _opened(model, data, config)
    if ready:
        batches = _read_ready(items, model, config.samples)
        if all(map(is_divisible, batches)):
            batches = _cut(batches, 0, config.samples, config.batch_size)
    else:
        samples = _read_samples(model, items, processing_class, config, config.samples)
        if not samples:
            raise ValueError(f"The data ({_describe(data)}) holds no sample that is not blank.")
        pad_id = _pad_id(model, processing_class)
        batches = [_collate(group, pad_id) for group in _groups(samples, config.batch_size)]
    for batch in batches:
        _complete(model, batch)
    return batches


def batch_all(
    model: PreTrainedModel, data: Any, processing_class: Any = None, *, max_length: int = 256, batch_size: int = 16
) -> Iterator[Batch]:
    """Batches of all of the data in its own order, one at a time, to evaluate on.

    Args:
        model: As in `prepare`.
        data: As in `prepare`, but no ready batches.
        processing_class: As in `prepare`.
        max_length: Tokens that a text is truncated to.
        batch_size: Samples in a batch.

    Raises:
        ValueError, TypeError: as in `prepare`; also a blank text, which would shift the samples against their labels.
    """
    items = iter(data)
    pad_id = _pad_id(model, processing_class)
    encoded = _encoded(model, items, processing_class, max_length)
    while group := list(itertools.islice(encoded, batch_size)):
        if None in group:
            raise ValueError("A text to evaluate on is blank: filter it out, together with its label.")
        batch = _collate([features for features in group if features is not None], pad_id)
        _complete(model, batch)
        yield batch


# Reading


def _opened(model: PreTrainedModel, data: Any, config: PruneConfig) -> tuple[Iterator[Any], bool]:
    """The items of the data, and whether they are ready batches."""
    items = _items(model, data, config)
    first = next(items, None)
    if first is None:
        raise ValueError(f"The calibration data ({_describe(data)}) is empty.")
    return itertools.chain([first], items), _is_batch(first, model)


def _items(model: PreTrainedModel, data: Any, config: PruneConfig) -> Iterator[Any]:
    """The items of the data in the order in which they are used."""
    if isinstance(data, (DatasetDict, IterableDatasetDict)):
        raise TypeError(f"Calibration data must be one split, choose one of {', '.join(map(repr, data))}.")
    if isinstance(data, pd.DataFrame):
        data = Dataset.from_pandas(data, preserve_index=False)
    if isinstance(data, Mapping):
        if not any(isinstance(value, torch.Tensor) for value in data.values()):
            raise TypeError(
                "A dict given as calibration data is one ready batch, but this one holds no tensors: tokenize with "
                "return_tensors='pt', or pass columns as datasets.Dataset.from_dict(data). Keys found: "
                f"{', '.join(map(repr, data)) or 'none'}."
            )
        yield data
    elif isinstance(data, IterableDataset):
        yield from _retrying(data.shuffle(seed=config.seed, buffer_size=config.samples + config.held_out))
    elif (
        isinstance(data, (Dataset, Sequence, torch.utils.data.Dataset))
        and not isinstance(data, (str, bytes))
        and hasattr(data, "__len__")
    ):
        order: Iterable[int] = range(len(data))
        if len(data) and not _is_batch(data[0], model):
            order = torch.randperm(len(data), generator=torch.Generator().manual_seed(config.seed)).tolist()
        yield from (data[i] for i in order)
    elif isinstance(data, Iterable) and not isinstance(data, (str, bytes, Path)):
        yield from data
    else:
        raise TypeError(
            "Calibration data must be a datasets.Dataset or IterableDataset, a list of strings or images, or an "
            f"iterable of ready batches (dicts of tensors), got {type(data).__name__}."
        )


def _retrying(data: IterableDataset) -> Iterator[Any]:
    """Items of a stream that can fail; it is started again, after a wait, behind the last item that came."""
    seen = failures = 0
    while True:
        try:
            for item in itertools.islice(iter(data), seen, None):
                seen, failures = seen + 1, 0
                yield item
            return
        except (OSError, httpx.HTTPError) as error:
            failures += 1
            if failures == _ATTEMPTS:
                raise
            wait = _FIRST_WAIT * 2 ** (failures - 1)
            logger.warning(f"The calibration data failed after {seen} items, trying again in {wait:g} s: {error}")
            time.sleep(wait)


def _describe(data: Any) -> str:
    kind = type(data).__name__
    if isinstance(data, (Dataset, IterableDataset)):
        name = data.info.dataset_name or data.info.builder_name
        return " ".join(filter(None, (kind, name, data.split and f"split {data.split}")))
    if isinstance(data, (list, tuple)) and data:
        return f"{kind} of {type(data[0]).__name__}"
    return kind


def _is_batch(item: Any, model: PreTrainedModel) -> bool:
    """Whether an item is a ready batch rather than one example."""
    return isinstance(item, Mapping) and is_ready(item, model)


# Samples


def _read_samples(
    model: PreTrainedModel, items: Iterator[Any], processing_class: Any, config: PruneConfig, wanted: int
) -> list[Features]:
    encoded = _encoded(model, items, processing_class, config.max_length)
    return list(itertools.islice(filter(None, encoded), wanted))


def _encoded(
    model: PreTrainedModel, items: Iterator[Any], processing_class: Any, max_length: int
) -> Iterator[Features | None]:
    """Features of each item, `None` for blank texts."""
    head = list(itertools.islice(items, _HEAD))
    whole = (item for item in head if all(value is not None for value in example_columns(item).values()))
    encode = make_encoder(
        model, next(whole, head[0]), processing_class, _max_length(model, processing_class, max_length)
    )
    yield from (encode(example_columns(item)) for item in itertools.chain(head, items))


def _max_length(model: PreTrainedModel, processing_class: Any, asked: int) -> int:
    """Tokens that a text is truncated to: the least that is asked for, or that tokenizer or positions allow."""
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    limits = [
        asked,
        getattr(tokenizer, "model_max_length", None),
        getattr(text_config(model), "max_position_embeddings", None),
    ]
    for name, module in model.named_modules():
        # RoBERTa numbers positions from the padding index on: so many rows of the table are never reached.
        if "position" in name and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            limits.append(module.num_embeddings - module.padding_idx - 1)
    return int(min(limit for limit in limits if limit is not None and limit > 0))


def _pad_id(model: PreTrainedModel, processing_class: Any) -> int:
    """Token id to pad with. Padding is masked, so any will do for models whose tokenizer has none."""
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    candidates = (
        getattr(tokenizer, "pad_token_id", None),
        getattr(text_config(model), "pad_token_id", None),
        getattr(tokenizer, "eos_token_id", None),
    )
    return next((candidate for candidate in candidates if candidate is not None and candidate >= 0), 0)


def _fewest_to_fit(found: int, config: PruneConfig, kind: str) -> int:
    """How many must be fitted on, where enough were found to hold out one more."""
    to_fit = 2 if config.shrinkage == "auto" else 1
    if found <= to_fit:
        raise ValueError(
            f"Calibration needs at least {to_fit + 1} {kind} with shrinkage={config.shrinkage!r}: {to_fit} to fit on "
            f"and 1 held out. Found {found}."
        )
    return to_fit


def _counts(found: int, config: PruneConfig) -> tuple[int, int]:
    """Samples to fit on and to hold out, of those found."""
    _fewest_to_fit(found, config, "samples that are not blank")
    fit = min(config.samples, found - max(1, found // 5))
    if found >= config.samples + config.held_out:
        fit = config.samples
    return fit, min(config.held_out, found - fit)


def _groups(samples: list[Features], batch_size: int, folds: int = 1) -> list[list[Features]]:
    """Samples of like length together, in equal groups whose number is a multiple of `folds` where it can be."""
    ordered = sorted(samples, key=lambda features: len(features["input_ids"]) if "input_ids" in features else 0)
    count = -(-len(ordered) // (batch_size * folds)) * folds
    bounds = np.linspace(0, len(ordered), min(count, len(ordered)) + 1).astype(int)
    return [ordered[start:stop] for start, stop in itertools.pairwise(bounds)]


def _collate(samples: list[Features], pad_id: int) -> Batch:
    """Stack samples; token-like columns are padded on the right, waveforms are cut to the shortest."""
    batch: Batch = {}
    for name in samples[0]:
        values = [features[name] for features in samples]
        if len({value.shape for value in values}) == 1:
            batch[name] = torch.stack(values)
        elif values[0].ndim == 1 and not values[0].is_floating_point():
            fill = pad_id if name.endswith("input_ids") else 0
            batch[name] = nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=fill)
        elif len({value.shape[1:] for value in values}) == 1 and name != "pixel_values":
            shortest = min(map(len, values))
            batch[name] = torch.stack([value[:shortest] for value in values])
        else:
            raise ValueError(
                f"{name} of one batch must have one shape, found {sorted({tuple(value.shape) for value in values})}: "
                "make the processor resize to one size, or set batch_size=1."
            )
    return batch


# Ready batches


def _read_ready(items: Iterable[Any], model: PreTrainedModel, wanted: int) -> list[Batch]:
    """Ready batches, labels dropped, until they hold the wanted number of samples, in three at least if uncut."""
    batches: list[Batch] = []
    found = 0
    for item in items:
        if not _is_batch(item, model):
            raise TypeError(f"Ready batches must all be dicts of tensors, found {type(item).__name__}.")
        batch = {name: value for name, value in item.items() if value is not None and not is_label(name, model)}
        batches.append(batch)
        found += _rows(batch)
        if found >= wanted and (len(batches) >= _FEWEST_UNCUT or all(map(is_divisible, batches))):
            break
    return batches


def _rows(batch: Batch) -> int:
    """Number of samples: other tensors may hold several rows a sample, such as patches, or one for all samples."""
    rows = {len(value) for value in batch.values() if isinstance(value, torch.Tensor) and value.ndim}
    return min(rows - {1}, default=1)


def _tokens(batches: list[Batch]) -> int | None:
    """Real tokens of the batches; `None` without token ids."""
    if not batches or "input_ids" not in batches[0]:
        return None
    return sum(int(batch.get("attention_mask", torch.ones_like(batch["input_ids"])).sum()) for batch in batches)


def is_divisible(batch: Batch) -> bool:
    """Whether the batch can be cut into samples: every tensor has one first dimension."""
    return all(
        isinstance(value, torch.Tensor) and value.ndim and len(value) == _rows(batch) for value in batch.values()
    )


def _split_ready(batches: list[Batch], config: PruneConfig) -> tuple[list[Batch], list[Batch], tuple[int, int]]:
    """Fit and held-out batches; cut along the first dimension where every tensor shares it, else whole."""
    if all(map(is_divisible, batches)):
        fit, held_out = _counts(sum(map(_rows, batches)), config)
        largest = min(config.batch_size, -(-fit // 2))
        return _cut(batches, 0, fit, largest), _cut(batches, fit, fit + held_out, config.batch_size), (fit, held_out)
    found = len(batches)
    fewest = _fewest_to_fit(found, config, "batches whose tensors do not share a first dimension")
    samples = list(itertools.accumulate(map(_rows, batches)))
    fit = max(fewest, min(bisect_left(samples, config.samples) + 1, found - max(1, found // 5)))
    return batches[:fit], batches[fit:], (samples[fit - 1], samples[-1] - samples[fit - 1])


def _pieces(batch: Batch, size: int) -> list[Batch]:
    return _cut([batch], 0, _rows(batch), size) if is_divisible(batch) else [batch]


def _cut(batches: list[Batch], start: int, stop: int, largest: int) -> list[Batch]:
    """Rows `start` to `stop`, counted over all batches, in batches of at most `largest`."""
    pieces = []
    for batch in batches:
        rows = _rows(batch)
        for first in range(max(start, 0), min(stop, rows), largest):
            last = min(first + largest, stop, rows)
            pieces.append({name: value[first:last] for name, value in batch.items()})
        start, stop = start - rows, stop - rows
    return pieces


def _complete(model: PreTrainedModel, batch: Batch) -> None:
    """Check a batch against the model, and add the decoder inputs that it lacks."""
    _check_ids(batch)
    _check_vocabulary(model, batch)
    add_decoder_inputs(model, batch)


def _check_ids(batch: Batch) -> None:
    for name in sorted({"input_ids", "decoder_input_ids"} & set(batch)):
        ids = batch[name]
        if ids.is_floating_point():
            raise ValueError(f"{name} of the calibration data must be whole numbers, token ids; found {ids.dtype}.")
        if ids.numel() and (least := int(ids.min())) < 0:
            raise ValueError(
                f"{name} of the calibration data holds {least}, but token ids are 0 or more: pad with a token's id "
                "and mask the padding in the attention mask; -100 belongs into labels alone."
            )


def _check_vocabulary(model: PreTrainedModel, batch: Batch) -> None:
    ids = batch.get("input_ids")
    known = getattr(text_config(model), "vocab_size", None)
    if ids is None or known is None:
        return
    try:
        embedding = model.get_input_embeddings()
    except NotImplementedError:
        embedding = None
    if isinstance(embedding, nn.Embedding):
        known = max(known, embedding.num_embeddings)
    if (largest := int(ids.max())) >= known:
        raise ValueError(
            f"The calibration data holds token id {largest}, but {type(model).__name__} embeds {known} tokens: "
            "the tokenizer belongs to another model."
        )
