"""A small synthetic batch for any `PreTrainedModel`, made from its forward's signature and its configuration."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from .offload import device_of
from .verification import undisturbed

SAMPLES = 2
TOKENS = 12
GRID = 4
FRAMES = 64
MOST_TRIES = 24
MOST_ERRORS = 4

Inputs = dict[str, Any]


def probe_inputs(model: nn.Module) -> Inputs:
    """Make two small random samples that the model's forward accepts, with every modality that it takes if possible.

    A forward's signature says which tensors it takes, the configuration (with its sub-configurations) their sizes.
    Where an argument has several usual layouts, such as images in batches or in lists of patches, the first with which
    the forward runs is taken. Token ids avoid the special ones and one sample is padded.

    Args:
        model: A `PreTrainedModel`; the same afterwards.

    Returns:
        Keyword arguments of the forward, on the model's device; floating inputs in the model's dtype.

    Raises:
        ValueError: The forward runs with nothing that was made; it lists the forward's arguments and the first errors.
    """
    parameter = next(model.parameters(), torch.zeros(()))
    errors: dict[str, None] = {}
    for inputs in itertools.islice(_candidates(model), MOST_TRIES):
        placed = {name: _placed(value, parameter) for name, value in inputs.items()}
        try:
            with undisturbed(model), torch.no_grad():
                model(**placed)
        except Exception as error:  # whatever a forward raises when its inputs are not to its liking
            shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in placed.items())
            errors[f"{shapes or 'no inputs'}: {type(error).__name__}: {str(error).strip()[:200]}"] = None
        else:
            return placed
    arguments = ", ".join(inspect.signature(model.forward).parameters)
    raise ValueError(
        f"No probe batch could be made for {type(model).__name__}, whose forward takes {arguments}. Tried "
        f"{'; '.join(list(errors)[:MOST_ERRORS]) or 'nothing'}. Pass `inputs`, a small batch of your own."
    )


def _placed(value: Any, like: torch.Tensor) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(device_of(like), like.dtype if value.is_floating_point() else value.dtype)


def _candidates(model: nn.Module) -> Iterator[Inputs]:
    """Batches to try: all modalities first, then the main one; each with the layouts that its arguments can have."""
    parameters = inspect.signature(model.forward).parameters
    sizes = Sizes(model.config)
    known = {name: MAKERS[name] for name in parameters if name in MAKERS}
    required = [
        name
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]
    main = [name for name in _listed(getattr(model, "main_input_name", "input_ids")) if name in parameters]
    if "decoder_input_ids" in parameters and "inputs_embeds" not in required:
        main.append("decoder_input_ids")
    modalities = [name for name in MODALITIES if name in parameters]
    for wanted in dict.fromkeys(tuple(dict.fromkeys(names)) for names in _choices(required, main, modalities)):
        if not known.keys() >= set(wanted):
            continue
        companions = [name for group in wanted for name in COMPANIONS.get(group, ()) if name in parameters]
        names = list(dict.fromkeys([*wanted, *companions]))
        for layouts in itertools.islice(itertools.product(*(known[name] for name in names)), MOST_TRIES // 2):
            inputs = {name: layout(sizes, model) for name, layout in zip(names, layouts, strict=True)}
            yield from _with_placeholders(model, {k: v for k, v in inputs.items() if v is not None})


def _choices(required: list[str], main: list[str], modalities: list[str]) -> Iterator[list[str]]:
    yield [*required, *modalities, *main]
    for modality in modalities:
        yield [*required, "input_ids", *main, modality] if "input_ids" in modalities else [*required, *main, modality]
    yield [*required, *main]
    yield required
    for modality in modalities:
        yield [*required, modality]


def _listed(value: Any) -> list[str]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


class Sizes:
    """Sizes that a configuration or one of its sub-configurations states."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self.configs = list(_all_configs(config))
        self.random = torch.Generator().manual_seed(0)

    def get(self, *names: str, default: Any = None, within: str = "") -> Any:
        """First of `names` that is set, looking first into the sub-configurations whose class name has `within`."""
        ordered = sorted(self.configs, key=lambda one: within.lower() not in type(one).__name__.lower())
        for one in ordered:
            for name in names:
                value = getattr(one, name, None)
                if value is not None and value != ():
                    return value
        return default

    def normal(self, *shape: int) -> torch.Tensor:
        """Standard normal float32 of the given shape."""
        return torch.randn(*shape, generator=self.random)

    @property
    def side(self) -> tuple[int, int]:
        """Height and width of an image."""
        size = self.get("image_size", "img_size", "crop_size", "pretrain_image_size", default=64, within="vision")
        size = size.get("height", 64) if isinstance(size, dict) else size
        height, width = (size[-2], size[-1]) if isinstance(size, (list, tuple)) and len(size) > 1 else (size, size)
        return height, width

    @property
    def channels(self) -> int:
        """Channels of an image."""
        channels = self.get(
            "num_channels", "in_channels", "in_chans", "num_input_channels", default=3, within="vision"
        )
        return channels if isinstance(channels, int) and channels < 16 else 3

    @property
    def patch(self) -> tuple[int, int]:
        """Height and width of a patch."""
        patch = self.get("patch_size", "spatial_patch_size", default=16, within="vision")
        patch = patch[0] if isinstance(patch, (list, tuple)) and isinstance(patch[0], (list, tuple)) else patch
        return (patch, patch) if isinstance(patch, int) else (patch[-2], patch[-1])

    @property
    def patch_width(self) -> int:
        """Entries of one flattened patch."""
        time = self.get("temporal_patch_size", "patch_temporal", default=1, within="vision")
        return self.channels * time * self.patch[0] * self.patch[1]

    @property
    def bins(self) -> int:
        """Frequency bins of a spectrogram."""
        return self.get(
            "num_mel_bins", "n_mel_bins", "input_feat_size", "input_feat_per_channel", "mel_bins",
            "feature_projection_input_dim", "input_feature_size", "input_dim", "input_size",
            default=80, within="audio",
        )  # fmt: skip

    @property
    def hidden(self) -> int:
        """Width of the hidden states."""
        return self.get("hidden_size", "d_model", "embed_dim", "n_embd", default=64)


def _all_configs(config: Any) -> Iterator[Any]:
    yield config
    for key in getattr(config, "sub_configs", {}):
        if getattr(config, key, None) is not None:
            yield from _all_configs(getattr(config, key))


Layout = Callable[[Sizes, nn.Module], Any]


def _tokens(sizes: Sizes, model: nn.Module) -> torch.Tensor:
    size = sizes.get("vocab_size", "text_vocab_size", "src_vocab_size", default=100, within="text")
    special = {value for one in sizes.configs for value in _special_ids(one)}
    usual = torch.tensor([i for i in range(min(size, 1000)) if i not in special] or [0])
    tokens = usual[torch.randint(len(usual), (SAMPLES, TOKENS), generator=sizes.random)]
    # A model that holds the tokens between which words attend to each other lets a word alone attend to itself only.
    held = [token for name, buffer in model.named_buffers() if name.endswith("special_tokens") for token in buffer]
    if held and held[0] < size:
        tokens[:, :: TOKENS // 2] = tokens[:, -1] = held[0]
    return tokens


def _channel_tokens(sizes: Sizes, model: nn.Module) -> torch.Tensor:
    """Tokens of a codec, one per channel at each time."""
    channels = sizes.get("num_channels", default=1, within="decoder")
    return torch.stack([_tokens(sizes, model) for _ in range(channels)], -1)


def _special_ids(config: Any) -> Iterator[int]:
    for name, value in vars(config).items():
        if name.endswith(("token_id", "token_index", "_token_ids")):
            yield from (v for v in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(v, int))


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


def _with_placeholders(model: nn.Module, inputs: Inputs) -> Iterator[Inputs]:
    """`inputs` with as many placeholder tokens in the text as the images and sounds beside it fill."""
    if "input_ids" not in inputs:
        yield inputs
        return
    sizes = Sizes(model.config)
    placeholders: list[int] = []
    for name, method, tokens in PLACEHOLDERS:
        token = sizes.get(*tokens)
        if name in inputs and isinstance(token, int):
            placeholders += [token] * (_features(model, method, inputs) // SAMPLES)
    if placeholders:
        row = torch.tensor(placeholders).expand(SAMPLES, -1)
        kinds = torch.cat([torch.zeros(SAMPLES, 1), torch.ones_like(row), torch.zeros(SAMPLES, TOKENS - 1)], 1)
        inputs = dict(inputs)
        inputs["input_ids"] = torch.cat([inputs["input_ids"][:, :1], row, inputs["input_ids"][:, 1:]], 1)
        if "attention_mask" in inputs:
            inputs["attention_mask"] = torch.cat([torch.ones_like(row), inputs["attention_mask"]], 1)
        for name in ("mm_token_type_ids", "token_type_ids"):
            if name in inspect.signature(model.forward).parameters:
                inputs[name] = kinds.long()
    yield inputs


def _features(model: nn.Module, method: str, inputs: Inputs) -> int:
    """Hidden states that a modality becomes; 0 if the model does not say."""
    owner = next((module for module in model.modules() if hasattr(module, method)), None)
    if owner is None:
        return 0
    function = getattr(owner, method)
    accepted = inspect.signature(inspect.unwrap(function)).parameters
    parameter = next(model.parameters())
    given = {name: _placed(value, parameter) for name, value in inputs.items() if name in accepted}
    given.pop("attention_mask", None)
    try:
        with undisturbed(model), torch.no_grad():
            output = function(**given)
    except Exception:  # the forward says what is wrong with the inputs
        return 0
    output = getattr(output, "pooler_output", output)
    rows = output if isinstance(output, (list, tuple)) else [output]
    return sum(row.numel() // row.shape[-1] for row in rows if isinstance(row, torch.Tensor))
