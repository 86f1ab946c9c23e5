"""Unlabeled data to calibration batches: read, tokenize, split, pad."""

import itertools
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from huggingface_hub.utils import httpx
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging
from transformers.utils.generic import find_labels

from ..config import PruneConfig
from ..models.running import Batch, goes_on_with_text
from ..models.sizes import Sizes
from .batches import Samples
from .collation import Encoded, Ready, collate, read_ready, uncut
from .decoding import add_decoder_inputs
from .features import Accepts, Sample, decoder_start, most_positions, text_config
from .probe import samples_in
from .rows import Rows
from .sounds import undecoded
from .trial import largest

logger = logging.get_logger(__name__)

# Tries of a source that fails in a row, and seconds before the second one; each further wait is twice as long.
_ATTEMPTS = 4
_FIRST_WAIT = 1.0


def read(model: PreTrainedModel, data: Any, config: PruneConfig, processing_class: Any = None) -> Samples:
    """Read `config.samples + config.held_out` samples and batch them for the model.

    Data with a length is sampled without replacement, streams are shuffled through a buffer of as many samples as are
    read, other iterables and ready batches are read in order. Blank texts and rows that lack a value are passed over.
    Plain texts are packed, as `packing` says; other samples are sorted by length and padded on the right to the
    longest of their batch, whatever the tokenizer's padding side is: without `position_ids` only then are a token's
    positions those it has alone. Waveforms are cut to the shortest instead. Batches are made smaller where more than a
    twenty-fifth would be padding, or be cut. Columns with labels are dropped, so that no loss is computed.
    Encoder-decoder models without decoder inputs get the text shifted right where both sides share a vocabulary; for
    speech and images the column of texts that stands beside them (`TRANSCRIPTS`), or what the model generates.

    Args:
        model: Any pretrained model; not changed.
        data: A `datasets.Dataset` or `IterableDataset` (text, conversations, prompt and completion, a pair of
            sentences, image or audio, or already tokenized), or a pandas `DataFrame` of such columns; a list of
            strings, images or waveforms; or ready batches (dicts of tensors).
        config: `samples`, `held_out`, `max_length`, `packing`, `batch_size`, `shrinkage`, `skip_unreadable` and `seed`
            are read.
        processing_class: Tokenizer, image processor, feature extractor or processor; not for processed data.

    Raises:
        ValueError: the data is empty or too short, has no fitting column, lacks its processing class, holds token ids
            that the model has no embedding for, or a sample that cannot be read, which is named; or the tokenizer is
            another model's.
        TypeError: the data is of a kind not listed above.
    """
    found = _found(model, data, config, processing_class, wanted=config.samples + config.held_out)
    fit, held_out, counts, cut = found.split(config)
    for batch in fit + held_out:
        _complete(model, batch)
    if counts < (config.samples, config.held_out):
        logger.warning(
            f"The calibration data ({_describe(data)}) holds {sum(counts)} samples, of {config.samples} to fit on and "
            f"{config.held_out} to hold out that were asked for: {counts[0]} are fitted on, {counts[1]} held out."
        )
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    return Samples(
        fit,
        held_out,
        *counts,
        source=_describe(data),
        model=model,
        cut=cut,
        tokenizer=tokenizer if isinstance(tokenizer, PreTrainedTokenizerBase) else None,
    )


def read_few(model: PreTrainedModel, data: Any, config: PruneConfig, processing_class: Any = None) -> Samples:
    """Two samples of the data, to try the model on, once it is certain that `read` would find enough.

    They are both those to fit on and those held out.

    Args:
        model, data, config, processing_class: As for `read`.

    Raises:
        ValueError, TypeError: as in `read`.
    """
    fit, held_out, *_ = _found(model, data, config, processing_class, config.samples + config.held_out).split(config)
    few = largest(fit + held_out)
    _complete(model, few)
    count = samples_in(few)
    return Samples([few], [few], count, count, source=_describe(data), model=model)


def batch_some(model: PreTrainedModel, data: Any, config: PruneConfig, processing_class: Any = None) -> list[Batch]:
    """Batches of `config.samples` samples, or of all that there are: to compare models on, none is set aside.

    Args:
        model: As in `read`.
        data: As in `read`.
        config: `samples`, `held_out`, `max_length`, `packing`, `batch_size`, `skip_unreadable` and `seed` are read.
        processing_class: As in `read`.

    Raises:
        ValueError, TypeError: as in `read`, but one sample is enough.
    """
    batches = _found(model, data, config, processing_class, wanted=config.samples).together(config)
    if not batches:
        raise ValueError(f"The data ({_describe(data)}) holds no sample that is not blank.")
    for batch in batches:
        _complete(model, batch)
    return batches


def batch_all(
    model: PreTrainedModel, data: Any, processing_class: Any = None, *, max_length: int = 256, batch_size: int = 16
) -> Iterator[Batch]:
    """Batches of all of the data in its own order, one at a time, to evaluate on; waveforms are not cut.

    Args:
        model: As in `read`.
        data: As in `read`, but no ready batches.
        processing_class: As in `read`.
        max_length: Tokens that a text is truncated to.
        batch_size: Samples in a batch.

    Raises:
        ValueError, TypeError: as in `read`; also a blank text, which would shift the samples against their labels.
    """
    pad_id, accepts = _pad_id(model, processing_class), _accepts(model)
    rows = Rows(model, accepts, processing_class, longest_text(model, processing_class, max_length))
    for group in uncut(_all_whole(rows.samples(enumerate(data))), batch_size):
        batch = collate(group, pad_id, accepts.token_axes - 1)
        _complete(model, batch)
        yield batch


def _all_whole(samples: Iterable[Sample | None]) -> Iterator[Sample]:
    for sample in samples:
        if sample is None:
            raise ValueError(
                "A sample to evaluate on is blank or lacks a value: filter it out, together with its label."
            )
        yield sample


def _accepts(model: PreTrainedModel) -> Accepts:
    arguments = frozenset(signature(model.forward).parameters)
    writes = model.config.is_encoder_decoder and "decoder_input_ids" in arguments and "input_ids" not in arguments
    return Accepts(
        architecture=type(model).__name__,
        arguments=arguments,
        main=model.main_input_name,
        targets=frozenset(find_labels(type(model))),
        sizes=Sizes(model.config),
        causal=goes_on_with_text(model),
        frames=getattr(model, "_get_feat_extract_output_lengths", None),
        start=decoder_start(model.config) if writes else None,
    )


def _found(
    model: PreTrainedModel, data: Any, config: PruneConfig, processing_class: Any, wanted: int
) -> Ready | Encoded:
    """What the data holds, until as many samples are read as are wanted."""
    accepts = _accepts(model)
    items = _items(data, config, accepts)
    first = next(items, None)
    if first is None:
        raise ValueError(f"The calibration data ({_describe(data)}) is empty.")
    items = itertools.chain([first], items)
    if accepts.is_batch(first[1]):
        return Ready(read_ready((item for _, item in items), accepts, wanted))
    rows = Rows(model, accepts, processing_class, longest_text(model, processing_class, config.max_length))
    most = -(-wanted // len(data)) if hasattr(data, "__len__") else 0
    samples = rows.samples(items, packing=config.packing, wanted=wanted, most=most, skip=config.skip_unreadable)
    read = list(itertools.islice(filter(None, samples), wanted))
    return Encoded(read, _pad_id(model, processing_class), accepts.token_axes - 1)


def _items(data: Any, config: PruneConfig, accepts: Accepts) -> Iterator[tuple[int, Any]]:
    """The items of the data in the order in which they are used, each with its number."""
    if isinstance(data, (DatasetDict, IterableDatasetDict)):
        raise TypeError(f"Calibration data must be one split, choose one of {', '.join(map(repr, data))}.")
    if isinstance(data, pd.DataFrame):
        data = Dataset.from_pandas(data, preserve_index=False)
    data = undecoded(data)
    if isinstance(data, Mapping):
        if not any(isinstance(value, torch.Tensor) for value in data.values()):
            raise TypeError(
                "A dict given as calibration data is one ready batch, but this one holds no tensors: tokenize with "
                "return_tensors='pt', or pass columns as datasets.Dataset.from_dict(data). Keys found: "
                f"{', '.join(map(repr, data)) or 'none'}."
            )
        yield 0, data
    elif isinstance(data, IterableDataset):
        shuffled = data.shuffle(seed=config.seed, buffer_size=config.samples + config.held_out)
        yield from enumerate(_retrying(shuffled))
    elif (
        isinstance(data, (Dataset, Sequence, torch.utils.data.Dataset))
        and not isinstance(data, (str, bytes))
        and hasattr(data, "__len__")
    ):
        order: Iterable[int] = range(len(data))
        if len(data) and not accepts.is_batch(data[0]):
            order = torch.randperm(len(data), generator=torch.Generator().manual_seed(config.seed)).tolist()
        yield from ((i, data[i]) for i in order)
    elif isinstance(data, Iterable) and not isinstance(data, (str, bytes, Path)):
        yield from enumerate(data)
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


def longest_text(model: PreTrainedModel, processing_class: Any, asked: int) -> int:
    """Tokens that a text is truncated to: the least that is asked for, or that tokenizer or positions allow."""
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    limits = (asked, getattr(tokenizer, "model_max_length", None), most_positions(model))
    return int(min(limit for limit in limits if limit is not None and limit > 0))


def _pad_id(model: PreTrainedModel, processing_class: Any) -> int:
    """Token id to pad with. Padding is masked, so any will do for models whose tokenizer has none."""
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    candidates = (
        getattr(tokenizer, "pad_token_id", None),
        getattr(text_config(model.config), "pad_token_id", None),
        getattr(tokenizer, "eos_token_id", None),
    )
    return next((candidate for candidate in candidates if candidate is not None and candidate >= 0), 0)


def _complete(model: PreTrainedModel, batch: Batch) -> None:
    """Check a batch against the model, and add the decoder inputs that it lacks."""
    _check_ids(batch)
    _check_vocabulary(model, batch)
    if model.config.is_encoder_decoder and "decoder_input_ids" in signature(model.forward).parameters:
        add_decoder_inputs(model, batch)


def _check_ids(batch: Batch) -> None:
    for name in sorted({"input_ids", "decoder_input_ids"} & set(batch)):
        ids = batch[name]
        if ids.is_floating_point():
            raise ValueError(f"{name} of the calibration data must be whole numbers, token ids; found {ids.dtype}.")
        if not ids.numel():
            raise ValueError(
                f"{name} of the calibration data has no token, in shape {tuple(ids.shape)}: leave such batches out."
            )
        if (least := int(ids.min())) < 0:
            raise ValueError(
                f"{name} of the calibration data holds {least}, but token ids are 0 or more: pad with a token's id "
                "and mask the padding in the attention mask; -100 belongs into labels alone."
            )


def _check_vocabulary(model: PreTrainedModel, batch: Batch) -> None:
    ids = batch.get("input_ids")
    known = getattr(text_config(model.config), "vocab_size", None)
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
