"""Small random inputs of every modality, in the shapes that a config asks for."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..models.sizes import Sizes

SAMPLES = 2
TOKENS = 12
GRID = 4
FRAMES = 64

Inputs = dict[str, Any]


Layout = Callable[[Sizes, nn.Module], Any]


def _tokens(sizes: Sizes, model: nn.Module) -> torch.Tensor:
    size = sizes.get("vocab_size", "text_vocab_size", "src_vocab_size", default=100, within="text")
    tokens = sizes.tokens((SAMPLES, TOKENS), size)
    # A model that holds the tokens between which words attend to each other lets a word alone attend to itself only.
    held = [token for name, buffer in model.named_buffers() if name.endswith("special_tokens") for token in buffer]
    if held and held[0] < size:
        tokens[:, :: TOKENS // 2] = tokens[:, -1] = held[0]
    return tokens


def _channel_tokens(sizes: Sizes, model: nn.Module) -> torch.Tensor:
    """Tokens of a codec, one per channel at each time."""
    channels = sizes.get("num_channels", default=1, within="decoder")
    return torch.stack([_tokens(sizes, model) for _ in range(channels)], -1)


def _padded(sizes: Sizes, model: nn.Module) -> torch.Tensor:
    mask = torch.ones(SAMPLES, TOKENS, dtype=torch.long)
    mask[-1, -2:] = 0
    return mask


def _image(sizes: Sizes, model: nn.Module) -> torch.Tensor:
    return sizes.normal(SAMPLES, sizes.channels, *sizes.side)


def _images(sizes: Sizes, model: nn.Module) -> torch.Tensor:
    return _image(sizes, model).unsqueeze(1)


def _image_pairs(sizes: Sizes, model: nn.Module) -> torch.Tensor:
    return torch.stack([_image(sizes, model), _image(sizes, model)], 1)


def _square(side: int) -> Layout:
    return lambda sizes, model: sizes.normal(SAMPLES, sizes.channels, side, side)


def _patches(sizes: Sizes, model: nn.Module) -> torch.Tensor:
    return sizes.normal(SAMPLES * GRID * GRID, sizes.patch_width)


def _patch_images(sizes: Sizes, model: nn.Module) -> torch.Tensor:
    return sizes.normal(SAMPLES * GRID * GRID, sizes.channels, *sizes.patch)


def _patch_rows(sizes: Sizes, model: nn.Module) -> torch.Tensor:
    return sizes.normal(SAMPLES, GRID * GRID, sizes.patch_width)


def _pixels(sizes: Sizes, model: nn.Module) -> torch.Tensor:
    """The layout that the forward's other arguments tell."""
    arguments = inspect.signature(model.forward).parameters
    if any(name.endswith("grid_thw") for name in arguments):
        return _patches(sizes, model)
    if any(name in arguments for name in ("spatial_shapes", "pixel_position_ids", "image_position_ids")):
        return _patch_rows(sizes, model)
    return _image(sizes, model)


def _video(sizes: Sizes, model: nn.Module) -> torch.Tensor:
    frames = sizes.get("num_frames", "frames_per_clip", default=4)
    return sizes.normal(SAMPLES, frames, sizes.channels, *sizes.side)


def _grid(sizes: Sizes, model: nn.Module) -> torch.Tensor:
    return torch.tensor([[1, GRID, GRID]] * SAMPLES)


def _grid_positions(sizes: Sizes, model: nn.Module) -> torch.Tensor:
    rows, columns = torch.meshgrid(torch.arange(GRID), torch.arange(GRID), indexing="ij")
    return torch.stack([columns, rows], -1).reshape(1, GRID * GRID, 2).repeat(SAMPLES, 1, 1)


def _frames(sizes: Sizes) -> int:
    positions = sizes.get("max_source_positions", within="audio")
    return 2 * positions if positions is not None and positions <= 2 * FRAMES else 2 * FRAMES


def _spectrogram(sizes: Sizes, model: nn.Module) -> torch.Tensor:
    return sizes.normal(SAMPLES, sizes.bins, _frames(sizes))


def _feature_rows(sizes: Sizes, model: nn.Module) -> torch.Tensor:
    return sizes.normal(SAMPLES, _frames(sizes), sizes.bins)


def _spectrogram_image(sizes: Sizes, model: nn.Module) -> torch.Tensor:
    return sizes.normal(SAMPLES, 1, _frames(sizes), sizes.bins)


def _waveform(sizes: Sizes, model: nn.Module) -> torch.Tensor:
    return sizes.normal(SAMPLES, 4000)


def _channel_waveform(sizes: Sizes, model: nn.Module) -> torch.Tensor:
    return sizes.normal(SAMPLES, 1, 3840)


def _audio_spectrogram(sizes: Sizes, model: nn.Module) -> torch.Tensor:
    return sizes.normal(SAMPLES, sizes.get("max_length", default=FRAMES), sizes.bins)


def _flattened_patches(sizes: Sizes, model: nn.Module) -> torch.Tensor:
    width = sizes.get("patch_embed_hidden_size", default=sizes.patch_width)
    numbered = torch.stack([torch.arange(1, GRID * GRID + 1), torch.ones(GRID * GRID)], -1)  # rows and columns
    return torch.cat([numbered.expand(SAMPLES, -1, -1), sizes.normal(SAMPLES, GRID * GRID, width)], -1)


def _states(sizes: Sizes, model: nn.Module) -> torch.Tensor:
    return sizes.normal(SAMPLES, TOKENS, sizes.hidden)


def _series(sizes: Sizes, model: nn.Module) -> torch.Tensor:
    length = sizes.get("context_length", default=32)
    return sizes.normal(SAMPLES, length, sizes.get("num_input_channels", default=1))


def _single_series(sizes: Sizes, model: nn.Module) -> torch.Tensor:
    return sizes.normal(SAMPLES, sizes.get("context_length", default=32))


def _ones(*shape: int, dtype: torch.dtype = torch.long) -> Layout:
    return lambda sizes, model: torch.ones(SAMPLES, *shape, dtype=dtype)


def _boxes(sizes: Sizes, model: nn.Module) -> torch.Tensor:
    return torch.tensor([10, 10, 20, 30]).expand(SAMPLES, TOKENS, 4).clone()


# The layouts that an argument of a forward can have, the usual one first.
MAKERS: dict[str, tuple[Layout, ...]] = {
    "input_ids": (_tokens,),
    "attention_mask": (_padded,),
    "decoder_input_ids": (_tokens, _channel_tokens),
    "qformer_input_ids": (_tokens,),
    "bbox": (_boxes,),
    "pixel_values": (
        _pixels, _images, _square(64), _square(128), _square(224), _patch_rows, _patches, _patch_images, _image_pairs,
        _video,
    ),
    "pixel_values_videos": (_video,),
    "image": (_image,),
    "hidden_states": (_patches, _states, _image, _patch_images, _patch_rows),
    "grid_thw": (_grid,),
    "image_grid_thw": (_grid,),
    "merge_sizes": (lambda sizes, model: torch.full((SAMPLES,), 2),),
    "spatial_shapes": (lambda sizes, model: torch.tensor([[GRID, GRID]] * SAMPLES),),
    "pixel_attention_mask": (_ones(GRID * GRID), lambda sizes, model: None),
    "pixel_position_ids": (_grid_positions,),
    "image_position_ids": (_grid_positions,),
    "image_sizes": (lambda sizes, model: None, lambda sizes, model: torch.tensor([sizes.side] * SAMPLES)),
    "input_features": (_spectrogram, _feature_rows, _spectrogram_image),
    "input_features_mask": (
        lambda sizes, model: torch.ones(SAMPLES, _frames(sizes), dtype=torch.long), lambda sizes, model: None,
    ),
    "feature_attention_mask": (lambda sizes, model: torch.ones(SAMPLES, _frames(sizes), dtype=torch.long),),
    "input_values": (_waveform, _channel_waveform, _audio_spectrogram),
    "past_values": (_series, _single_series),
    "inputs_embeds": (_states,),
    "query_embeds": (_states,),
    "flattened_patches": (_flattened_patches,),
    "visual_feats": (lambda sizes, model: sizes.normal(SAMPLES, GRID, sizes.get("visual_feat_dim", default=64)),),
    "visual_pos": (lambda sizes, model: sizes.normal(SAMPLES, GRID, sizes.get("visual_pos_dim", default=4)),),
    "spectrogram": (lambda sizes, model: sizes.normal(SAMPLES, TOKENS, sizes.get("model_in_dim", default=80)),),
    "inputs": (_tokens, _waveform, _states),
}  # fmt: skip
MODALITIES = ("input_ids", "pixel_values", "input_features", "input_values")
COMPANIONS = {
    "input_ids": ("attention_mask", "bbox", "visual_feats", "visual_pos"),
    "pixel_values": (
        "image_grid_thw", "grid_thw", "spatial_shapes", "pixel_attention_mask", "pixel_position_ids",
        "image_position_ids", "image_sizes", "merge_sizes",
    ),
    "input_features": ("input_features_mask", "feature_attention_mask"),
}  # fmt: skip

# Where a model turns a modality into hidden states, and the configuration's name of the token that stands for one.
PLACEHOLDERS = (
    ("pixel_values", "get_image_features", ("image_token_id", "image_token_index", "img_token_id")),
    ("input_features", "get_audio_features", ("audio_token_id", "audio_token_index")),
    ("input_values", "get_audio_features", ("audio_token_id", "audio_token_index")),
)
