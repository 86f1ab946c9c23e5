"""One raw example (text, image, audio or token ids) to the tensors that a model takes, without labels."""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from inspect import signature
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from .features import INPUTS, Accepts, Features, Sample, example_columns
from .images import as_picture, is_picture
from .sounds import is_file, is_stored, is_waveform, waveform
from .texts import TRANSCRIPTS, TextColumns, Written, text_columns, tokenize

_PARTS = {"text": "tokenizer", "image": "image_processor", "audio": "feature_extractor"}

# Inputs of which a row holds a batch of one where it has a dimension too many.
_IN_BATCHES_OF_ONE = ("input_ids", "pixel_values", "input_features")


@dataclass(frozen=True)
class Encoder:
    """What turns rows of one kind into samples.

    Args:
        columns: That it reads; none may be missing.
        encode: From a row to its sample; `None` for a blank text.
        text: Where the text stands, if it reads one.
        alone: Whether text is all that it reads.
        tokenizes: Whether it reads text, be it that which stands beside a sound or an image.
    """

    columns: frozenset[str]
    encode: Callable[[Mapping[str, Any]], Sample | None]
    text: TextColumns | None = None
    alone: bool = False
    tokenizes: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether it reads plain text and nothing else."""
        return self.alone and self.text is not None and self.text.plain


class Encoders:
    """Turns rows into samples, of one kind or, in a mixture of data sets, of several.

    Args:
        accepts: What the model takes.
        processing_class: Tokenizer, image processor, feature extractor or processor.
        longest: Tokens that a text is truncated to.
    """

    def __init__(self, accepts: Accepts, processing_class: Any, longest: int) -> None:
        self.accepts, self.processing_class, self.longest = accepts, processing_class, longest
        self.known: list[Encoder] = []

    def learn(self, item: Any) -> Encoder:
        """The encoder of an item without a missing value, from now on for others like it.

        Raises:
            ValueError: no column fits the model's inputs, or the processing class for it is missing.
        """
        self.known.append(make_encoder(self.accepts, item, self.processing_class, self.longest))
        return self.known[-1]

    def of(self, row: Mapping[str, Any]) -> Encoder | None:
        """The encoder of a row; `None` where a value is missing that it would read."""
        present = {name: value for name, value in row.items() if value is not None}
        found = next((encoder for encoder in self.known if encoder.columns <= present.keys()), None)
        if found is None and self._is_another_kind(present):
            return self.learn(present)
        return found

    def _is_another_kind(self, present: Mapping[str, Any]) -> bool:
        tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)
        text = text_columns(present, self.accepts, tokenizer)
        return text is not None and text.named and self.known[0].alone


def make_encoder(accepts: Accepts, item: Any, processing_class: Any, longest: int) -> Encoder:
    """The encoder for items like one.

    Raises:
        ValueError: no column fits the model's inputs, several images or sounds do, or the processing class is missing.
    """
    row = {name: value for name, value in example_columns(item).items() if value is not None}
    arguments = accepts.arguments
    inputs = {accepts.main, *itertools.chain(*INPUTS.values())}
    if any(name in row for name in inputs & arguments):
        columns = frozenset(name for name in row if name in arguments and not accepts.is_label(name))
        return Encoder(columns, lambda given: _processed(accepts, columns, given, longest))
    modalities = [kind for kind, names in INPUTS.items() if arguments.intersection(names)]
    if not modalities:
        raise ValueError(
            f"{accepts.architecture}.forward names no input for text, images or audio, only "
            f"{', '.join(sorted(arguments))}: write its arguments out, or pass ready batches (dicts of tensors)."
        )
    text = None
    if "text" in modalities:
        text = text_columns(row, accepts, getattr(processing_class, "tokenizer", processing_class))
    beside = ((kind, _column(kind, row, accepts)) for kind in modalities if kind != "text")
    others = {kind: column for kind, column in beside if column is not None}
    if text is None and not others:
        main = next((kind for kind in modalities if accepts.main in INPUTS[kind]), "text")
        raise ValueError(
            f"The calibration data has no {main} column for {accepts.architecture}. {_NEEDED[main]} {_found(item)}"
        )
    if text is not None and "image" in others and getattr(processing_class, "image_token", None):
        raise ValueError(
            f"{type(processing_class).__name__} places images inside the text: pass ready batches, such as those of "
            "processing_class.apply_chat_template(..., tokenize=True, return_dict=True, return_tensors='pt')."
        )
    read: list[Callable[[Mapping[str, Any]], Sample | None]] = []
    if text is not None:
        read.append(_text_reader(_part("text", processing_class), text, longest))
    for kind, column in others.items():
        read.append(_READERS[kind](_part(kind, processing_class), column, accepts))
    said = _transcripts(row, accepts, processing_class)
    if said is not None and accepts.start is not None:
        read.append(_transcript_reader(processing_class.tokenizer, said, accepts.start, longest))

    def encode(given: Mapping[str, Any]) -> Sample | None:
        parts = [sample for reader in read if (sample := reader(given)) is not None]
        if len(parts) < len(read):
            return None
        features = {k: v for part in parts for k, v in part.features.items() if k in arguments}
        return Sample(features, sum(part.cut for part in parts))

    columns = frozenset(filter(None, (*others.values(), said))) | (text.names if text is not None else frozenset())
    return Encoder(columns, encode, text, alone=not others, tokenizes=text is not None or said is not None)


_NEEDED = {
    "text": "It needs strings, in a column named 'text' where there are several of strings; conversations of "
    "'role' and 'content'; 'prompt' and 'completion'; a pair such as 'sentence1' and 'sentence2'; or token ids in a "
    "dict, {'input_ids': ids}.",
    "image": "It needs images; a column of file names becomes one with dataset.cast_column(name, datasets.Image()).",
    "audio": "It needs sound: names of files, or values with 'array' and 'sampling_rate', or with 'bytes' or 'path'.",
}


def _found(item: Any) -> str:
    if not isinstance(item, Mapping):
        return f"Its items are of type {type(item).__name__}."
    columns = (f"{name!r} of type {type(value).__name__}" for name, value in item.items())
    return f"Columns found: {', '.join(columns) or 'none'}."


# What tells images and sounds, the surest first: what a column holds by the next counts where none is found.
_FORMS: dict[str, tuple[Callable[[Any], bool], ...]] = {
    "image": (is_picture,),
    "audio": (is_stored, is_file, is_waveform),
}


def _column(kind: str, row: Mapping[str, Any], accepts: Accepts) -> str | None:
    """The column of images or sounds: the one of that name, or the only one."""
    values = {name: value for name, value in row.items() if not accepts.is_label(name)}
    found = ([name for name, value in values.items() if form(value)] for form in _FORMS[kind])
    candidates: list[str] = next(filter(None, found), [])
    if kind in candidates or len(candidates) < 2:
        return kind if kind in candidates else next(iter(candidates), None)
    raise ValueError(
        f"The calibration data has several columns of {kind}s, {', '.join(map(repr, candidates))}: name the one to "
        f"read {kind!r}, or leave the others out (on the command line, --column)."
    )


def _transcripts(row: Mapping[str, Any], accepts: Accepts, processing_class: Any) -> str | None:
    """The column of what is said in sounds or stands in images, for a decoder, if there is a tokenizer for it."""
    if accepts.start is None or not isinstance(getattr(processing_class, "tokenizer", None), PreTrainedTokenizerBase):
        return None
    texts = (name for name in TRANSCRIPTS if isinstance(row.get(name), str) and not is_file(row[name]))
    return next(texts, None)


def _part(kind: str, processing_class: Any) -> Any:
    """The tokenizer, image processor or feature extractor inside (or that is) the processing class."""
    name = _PARTS[kind]
    if processing_class is None:
        raise ValueError(f"Raw {kind} needs processing_class: pass the model's {name.replace('_', ' ')} or processor.")
    part = getattr(processing_class, name, processing_class)
    is_tokenizer = isinstance(part, PreTrainedTokenizerBase)
    if not callable(part) or is_tokenizer != (kind == "text"):
        raise ValueError(
            f"The data holds {kind} but processing_class is {type(processing_class).__name__}: "
            f"pass the model's {name.replace('_', ' ')} or processor."
        )
    return part


def _text_reader(tokenizer: Any, columns: TextColumns, longest: int) -> Callable[[Mapping[str, Any]], Sample | None]:
    def read(row: Mapping[str, Any]) -> Sample | None:
        written = columns.written(row)
        if written is None:
            return None
        ids, cut = tokenize(tokenizer, written, longest)
        return Sample({name: torch.tensor(value) for name, value in ids.items()}, cut) if ids["input_ids"] else None

    return read


def _transcript_reader(
    tokenizer: Any, column: str, start: int, longest: int
) -> Callable[[Mapping[str, Any]], Sample | None]:
    """What a decoder reads that writes down a transcript: the start token, and all but the end."""
    ends = {tokenizer.eos_token_id, tokenizer.sep_token_id}

    def read(row: Mapping[str, Any]) -> Sample | None:
        if not row[column].strip():
            return None
        columns, cut = tokenize(tokenizer, Written(row[column]), longest)
        written = columns["input_ids"]
        written = written if written[:1] == [start] else [start, *written]
        ids = torch.tensor(written[:-1] if len(written) > 1 and written[-1] in ends else written)
        return Sample({"decoder_input_ids": ids, "decoder_attention_mask": torch.ones_like(ids)}, cut)

    return read


def _image_reader(processor: Any, column: str, accepts: Accepts) -> Callable[[Mapping[str, Any]], Sample | None]:
    channels = accepts.sizes.channels

    def read(row: Mapping[str, Any]) -> Sample | None:
        encoded = processor(images=as_picture(row[column], channels), return_tensors="pt")
        return Sample({name: value[0] for name, value in encoded.items() if isinstance(value, torch.Tensor)})

    return read


def _audio_reader(extractor: Any, column: str, accepts: Accepts) -> Callable[[Mapping[str, Any]], Sample | None]:
    rate = extractor.sampling_rate
    # One clip alone has no padding but what its extractor always adds, up to a fixed length. The model reads that as
    # silence, and the mask tells which frames are none, where it makes no difference whether the clip ends in zeros.
    padding = signature(extractor.__call__).parameters.get("padding")
    masked = "attention_mask" in accepts.arguments and padding is not None and padding.default == "max_length"
    names = (*INPUTS["audio"], "attention_mask") if masked else INPUTS["audio"]

    def read(row: Mapping[str, Any]) -> Sample | None:
        values = waveform(row[column], rate)
        if values is None:
            return None
        if accepts.frames is not None and accepts.frames(len(values)) < 1:
            raise ValueError(f"The clip has {len(values)} values, too few for the model to make a frame of them.")
        options = {"return_attention_mask": True} if masked else {}
        if masked and values.any():
            values = np.trim_zeros(values, "b")
        encoded = extractor(values, sampling_rate=rate, return_tensors="pt", **options)
        return Sample({name: encoded[name][0] for name in names if name in encoded})

    return read


_READERS = {"image": _image_reader, "audio": _audio_reader}


def _processed(accepts: Accepts, columns: frozenset[str], row: Mapping[str, Any], longest: int) -> Sample | None:
    """A row that is already tokenized (or otherwise processed), truncated; columns of no use are dropped."""
    features: Features = {name: _tensor(value) for name, value in row.items() if name in columns}
    if any(name in features and accepts.is_batch({name: features[name]}) for name in _IN_BATCHES_OF_ONE):
        if any(len(value) != 1 for value in features.values()):
            shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in features.items())
            raise ValueError(f"A row must be one sample, but this one holds several: {shapes}.")
        features = {name: value[0] for name, value in features.items()}
    ids = features.get("input_ids")
    if ids is None:
        return Sample(features)
    axis = min(accepts.token_axes, ids.ndim) - 1
    if ids.shape[axis] == 0:
        return None
    if "attention_mask" in accepts.arguments and "attention_mask" not in features:
        features["attention_mask"] = torch.ones_like(ids)
    length, kept = ids.shape[axis], min(longest, ids.shape[axis])
    return Sample(
        {
            name: value.narrow(axis, 0, kept) if value.shape[: axis + 1] == ids.shape[: axis + 1] else value
            for name, value in features.items()
        },
        length - kept,
    )


def _tensor(value: Any) -> torch.Tensor:
    """A column's value; doubles of Python and NumPy are of the precision that models take."""
    if isinstance(value, torch.Tensor):
        return value
    tensor = torch.as_tensor(np.asarray(value))
    return tensor.to(torch.get_default_dtype()) if tensor.dtype == torch.float64 else tensor
