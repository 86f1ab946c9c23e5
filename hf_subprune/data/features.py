"""One raw example (text, image, audio or token ids) to the tensors that a model takes, without labels."""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.image_utils import is_pil_image

from ..models.sizes import Sizes

Features = dict[str, torch.Tensor]

# The forward argument that holds each modality's input; a model has one of the names given.
_INPUTS = {"text": ("input_ids",), "image": ("pixel_values",), "audio": ("input_features", "input_values")}
_PARTS = {"text": "tokenizer", "image": "image_processor", "audio": "feature_extractor"}

_PATCH_PLACES = ("grid_thw", "spatial_shapes", "pixel_position_ids", "image_position_ids")


def text_config(config: Any) -> Any:
    """The part of a model's config that describes its token inputs: the encoder's, where both sides have one."""
    if not config.is_encoder_decoder:
        return config.get_text_config()
    sides = (
        getattr(config, "encoder", None),
        config.get_text_config(encoder=True),
        config.get_text_config(decoder=True),
    )
    return next((side for side in sides if getattr(side, "vocab_size", None) is not None), config)


def most_positions(model: PreTrainedModel) -> int | None:
    """Tokens of the longest text that the positions of a model allow; `None` where they allow any."""
    limits = [getattr(text_config(model.config), "max_position_embeddings", None)]
    for name, module in model.named_modules():
        # RoBERTa numbers positions from the padding index on: so many rows of the table are never reached.
        if "position" in name and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            limits.append(module.num_embeddings - module.padding_idx - 1)
    return min((limit for limit in limits if limit is not None and limit > 0), default=None)


@dataclass(frozen=True)
class Accepts:
    """What a model's forward accepts, as far as it decides how data are read.

    Args:
        architecture: Name of the model's class, for messages.
        arguments: Names of the forward's arguments.
        main: The argument that holds the model's main input, e.g. `"input_ids"`.
        targets: Arguments that the forward would compute a loss from.
        sizes: Of inputs, as the model's config states them.
    """

    architecture: str
    arguments: frozenset[str]
    main: str
    targets: frozenset[str]
    sizes: Sizes

    def is_label(self, name: str) -> bool:
        """Whether a column holds labels: named so, or one that the forward would compute a loss from."""
        return "label" in name or name in self.targets

    def is_batch(self, item: Any) -> bool:
        """Whether an item is a ready batch rather than one sample, as far as the main input's dimensions tell.

        Without a tensor that a model could take, it is a sample; where the dimensions tell nothing, a batch.
        """
        if not isinstance(item, Mapping):
            return False
        tensors = {name: value for name, value in item.items() if isinstance(value, torch.Tensor)}
        usual = list(itertools.chain(*_INPUTS.values()))
        if not any(name in (*usual, *self.arguments) and not self.is_label(name) for name in tensors):
            return False
        main = next((name for name in ("input_ids", self.main, *usual) if name in tensors), None)
        return main is None or not self._is_one(main, tensors[main])

    def _is_one(self, name: str, value: torch.Tensor) -> bool:
        """Whether an input certainly holds a single sample."""
        if name == "input_ids":
            return value.ndim != 2
        if name == "input_values":
            spectrogram = (self.sizes.get("max_length"), self.sizes.get("num_mel_bins"))
            return value.ndim == 1 or tuple(value.shape) == spectrogram
        if name == "input_features":
            return value.ndim == 2 and self.sizes.bins in value.shape
        if name == "pixel_values" and self.sizes.get("tubelet_size") is None:
            # Towers that take a row of patches for an image have arguments that say where each patch lies.
            in_patches = any(argument.endswith(_PATCH_PLACES) for argument in self.arguments)
            return value.ndim == 3 and len(value) == self.sizes.channels and not in_patches
        return name == self.main and name.startswith("pixel_values") and value.ndim == 4


def example_columns(item: Any) -> Mapping[str, Any]:
    """An item of the calibration data as a mapping of columns.

    Raises:
        TypeError: the item is no mapping, string, image or waveform.
    """
    if isinstance(item, Mapping):
        return item
    if isinstance(item, str):
        return {"text": item}
    if is_pil_image(item):
        return {"image": item}
    if isinstance(item, (np.ndarray, torch.Tensor)) and item.ndim in (2, 3):
        return {"image": item}
    if isinstance(item, (np.ndarray, torch.Tensor)) and item.ndim == 1 and "float" in str(item.dtype):
        return {"audio": {"array": np.asarray(item), "sampling_rate": None}}
    raise TypeError(
        "Calibration data must hold strings, images, waveforms, rows of columns or ready batches (dicts of tensors), "
        f"got an item of type {type(item).__name__}. Token ids belong into a dict: {{'input_ids': ids}}."
    )


def make_encoder(
    accepts: Accepts, item: Any, processing_class: Any, max_length: int
) -> Callable[[Mapping[str, Any]], Features | None]:
    """The function that turns an example's columns into features; what it reads is decided by one item of the data.

    The function returns tensors without a batch dimension, or `None` for a blank text.

    Raises:
        ValueError: no column fits the model's inputs, or the processing class for it is missing.
        TypeError: the item is of no known kind.
    """
    first = example_columns(item)
    arguments = accepts.arguments
    inputs = {accepts.main, *itertools.chain(*_INPUTS.values())}
    if any(name in first for name in inputs & arguments):
        return lambda example: _encoded(accepts, example, max_length)

    modalities = [kind for kind, names in _INPUTS.items() if arguments.intersection(names)]
    main = next((kind for kind in modalities if accepts.main in _INPUTS[kind]), "text")
    columns = {kind: column for kind in modalities if (column := _column(kind, first, accepts)) is not None}
    if not modalities:
        raise ValueError(
            f"{accepts.architecture}.forward names no input for text, images or audio, only "
            f"{', '.join(sorted(arguments))}: write its arguments out, or pass ready batches (dicts of tensors)."
        )
    if not columns:
        raise ValueError(
            f"The calibration data has no {main} column for {accepts.architecture}. {_NEEDED[main]} {_found(item)}"
        )
    if {"text", "image"} <= set(columns) and getattr(processing_class, "image_token", None):
        raise ValueError(
            f"{type(processing_class).__name__} places images inside the text: pass ready batches, such as those of "
            "processing_class.apply_chat_template(..., tokenize=True, return_dict=True, return_tensors='pt')."
        )
    encoders = {kind: _ENCODERS[kind](_part(kind, processing_class), max_length) for kind in columns}

    def encode(example: Mapping[str, Any]) -> Features | None:
        features: Features = {}
        for kind, column in columns.items():
            encoded = encoders[kind](example[column])
            if encoded is None:
                return None
            features |= {name: value for name, value in encoded.items() if name in arguments}
        return features

    return encode


_NEEDED = {
    "text": "It needs strings, in a column named 'text' where there are several of strings, or token ids in a dict, "
    "{'input_ids': ids}.",
    "image": "It needs images; a column of file names becomes one with dataset.cast_column(name, datasets.Image()).",
    "audio": "It needs audio, each value with 'array' and 'sampling_rate'; a column of file names becomes one with "
    "dataset.cast_column(name, datasets.Audio()).",
}


def _found(item: Any) -> str:
    if not isinstance(item, Mapping):
        return f"Its items are of type {type(item).__name__}."
    columns = (f"{name!r} of type {type(value).__name__}" for name, value in item.items())
    return f"Columns found: {', '.join(columns) or 'none'}."


def _column(kind: str, example: Mapping[str, Any], accepts: Accepts) -> str | None:
    candidates = [name for name, value in example.items() if _IS_KIND[kind](value) and not accepts.is_label(name)]
    if kind in candidates:
        return kind
    if kind == "text" and len(candidates) != 1:
        return None
    return candidates[0] if candidates else None


def _is_image(value: Any) -> bool:
    return is_pil_image(value) or (isinstance(value, (np.ndarray, torch.Tensor)) and value.ndim in (2, 3))


def _is_audio(value: Any) -> bool:
    # `datasets` decodes audio to a dict, or to a decoder that is indexed as one.
    return (isinstance(value, Mapping) and "array" in value) or hasattr(value, "get_all_samples")


_IS_KIND: dict[str, Callable[[Any], bool]] = {
    "text": lambda value: isinstance(value, str),
    "image": _is_image,
    "audio": _is_audio,
}


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


def _text_encoder(tokenizer: Any, max_length: int) -> Callable[[Any], Features | None]:
    def encode(text: Any) -> Features | None:
        if not isinstance(text, str) or not text.strip():
            return None
        ids = tokenizer(text, truncation=True, max_length=max_length, return_attention_mask=True)
        # Tokenizers truncate nothing where their special tokens alone are longer.
        return {name: torch.tensor(value[:max_length]) for name, value in ids.items()} if ids["input_ids"] else None

    return encode


def _image_encoder(image_processor: Any, max_length: int) -> Callable[[Any], Features | None]:
    def encode(image: Any) -> Features:
        if is_pil_image(image):
            image = image.convert("RGB")
        encoded = image_processor(images=image, return_tensors="pt")
        return {name: value[0] for name, value in encoded.items() if isinstance(value, torch.Tensor)}

    return encode


def _audio_encoder(extractor: Any, max_length: int) -> Callable[[Any], Features | None]:
    def encode(audio: Any) -> Features:
        rate = audio["sampling_rate"] or extractor.sampling_rate
        if rate != extractor.sampling_rate:
            raise ValueError(
                f"The audio has {rate} samples a second and the model takes {extractor.sampling_rate}: resample it, "
                f"for a dataset with dataset.cast_column('audio', Audio(sampling_rate={extractor.sampling_rate}))."
            )
        encoded = extractor(np.asarray(audio["array"]), sampling_rate=rate, return_tensors="pt")
        # One clip alone has no padding but what its extractor always adds, which the model reads as silence.
        return {name: encoded[name][0] for name in _INPUTS["audio"] if name in encoded}

    return encode


_ENCODERS: dict[str, Callable[[Any, int], Callable[[Any], Features | None]]] = {
    "text": _text_encoder,
    "image": _image_encoder,
    "audio": _audio_encoder,
}


def _encoded(accepts: Accepts, example: Mapping[str, Any], max_length: int) -> Features | None:
    """An example that is already tokenized (or otherwise processed), truncated; columns of no use are dropped."""
    features = {
        name: _tensor(value)
        for name, value in example.items()
        if name in accepts.arguments and value is not None and not accepts.is_label(name)
    }
    ids = features.get("input_ids")
    if ids is None:
        return features
    if len(ids) == 0:
        return None
    if "attention_mask" in accepts.arguments and "attention_mask" not in features:
        features["attention_mask"] = torch.ones_like(ids)
    return {
        name: value[:max_length] if value.ndim == 1 and len(value) == len(ids) else value
        for name, value in features.items()
    }


def _tensor(value: Any) -> torch.Tensor:
    """A column's value; doubles of Python and NumPy are of the precision that models take."""
    if isinstance(value, torch.Tensor):
        return value
    tensor = torch.as_tensor(np.asarray(value))
    return tensor.to(torch.get_default_dtype()) if tensor.dtype == torch.float64 else tensor
