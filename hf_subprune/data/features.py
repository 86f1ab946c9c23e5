"""What a model accepts, and what a sample of data is."""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..models.sizes import Sizes
from .images import is_picture
from .sounds import is_file, is_waveform

Features = dict[str, torch.Tensor]


@dataclass(frozen=True, eq=False)
class Sample:
    """One sample as a model takes it.

    Args:
        features: Tensors without a batch dimension, by argument of the forward.
        cut: How much of it was left out, in tokens.
    """

    features: Features
    cut: int = 0


INPUTS = {"text": ("input_ids",), "image": ("pixel_values",), "audio": ("input_features", "input_values")}
"""The forward arguments that hold each modality's input; a model has one of them."""
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


def decoder_start(config: Any) -> int:
    """The token that the decoder of an encoder-decoder model begins with."""
    decoder = config.get_text_config(decoder=True)
    candidates = (
        getattr(config, "decoder_start_token_id", None),
        getattr(decoder, "decoder_start_token_id", None),
        getattr(decoder, "bos_token_id", None),
        getattr(decoder, "pad_token_id", None),
    )
    return next((token for token in candidates if token is not None), 0)


def most_positions(model: PreTrainedModel) -> int | None:
    """Tokens of the longest text that the positions of a model allow; `None` where they allow any."""
    limits = [getattr(text_config(model.config), "max_position_embeddings", None)]
    limits.append(getattr(model.config, "max_target_positions", None))  # of a decoder that writes down speech
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
        causal: Whether it is a language model that reads text from left to right.
        frames: From the values of a waveform to the frames that a speech encoder makes of them, where it says so.
        start: The token that a decoder begins with which writes down what is no text; `None` where there is none.
    """

    architecture: str
    arguments: frozenset[str]
    main: str
    targets: frozenset[str]
    sizes: Sizes
    causal: bool = False
    frames: Callable[[int], int] | None = None
    start: int | None = None

    @property
    def token_axes(self) -> int:
        """Dimensions of a sample's token ids: 2, `(choices, length)`, for multiple choice, else 1."""
        return 2 if "MultipleChoice" in self.architecture else 1

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
        usual = list(itertools.chain(*INPUTS.values()))
        if not any(name in (*usual, *self.arguments) and not self.is_label(name) for name in tensors):
            return False
        main = next((name for name in ("input_ids", self.main, *usual) if name in tensors), None)
        return main is None or not self._is_one(main, tensors[main])

    def _is_one(self, name: str, value: torch.Tensor) -> bool:
        """Whether an input certainly holds a single sample."""
        if name == "input_ids":
            return value.ndim <= self.token_axes
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
    if is_picture(item):
        return {"image": item}
    if is_waveform(item) or is_file(item):
        return {"audio": item}
    raise TypeError(
        "Calibration data must hold strings, images, waveforms, rows of columns or ready batches (dicts of tensors), "
        f"got an item of type {type(item).__name__}. Token ids belong into a dict: {{'input_ids': ids}}."
    )
