"""A tiny synthetic batch for any `PreTrainedModel`."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

SAMPLES = 2
TOKENS = 8


def probe_inputs(model: nn.Module) -> dict[str, torch.Tensor]:
    """Make two small random samples that the model's forward accepts.

    Token ids avoid the special ones, one sample carries padding in its attention mask, and images, spectrograms and
    waveforms have the sizes that the config (or a sub-config) states.

    Args:
        model: A `PreTrainedModel`.

    Returns:
        Keyword arguments of the forward, on the model's device; floating inputs in the model's dtype.

    Raises:
        ValueError: nothing is known to make for the forward's arguments; it lists them.
    """
    arguments = inspect.signature(model.forward).parameters
    random = torch.Generator().manual_seed(0)
    config: Any = model.config
    inputs: dict[str, torch.Tensor] = {}
    main = getattr(model, "main_input_name", "input_ids")
    if "input_ids" in arguments:
        inputs.update(_text(config, random))
    if "pixel_values" in arguments:
        inputs["pixel_values"] = _image(config, random)
    if main == "input_features":
        inputs["input_features"] = _spectrogram(config, random)
    if main == "input_values":
        inputs["input_values"] = torch.randn(SAMPLES, 4000, generator=random)
    if "decoder_input_ids" in arguments:
        inputs["decoder_input_ids"] = _text(config, random)["input_ids"]
    inputs = {name: value for name, value in inputs.items() if name in arguments}
    if not inputs:
        raise ValueError(
            f"No probe batch can be made for {type(model).__name__}, whose forward takes {', '.join(arguments)}. "
            f"Pass `inputs`, a small batch of your own."
        )
    parameter = next(model.parameters())
    return {
        name: value.to(parameter.device, parameter.dtype if value.is_floating_point() else value.dtype)
        for name, value in inputs.items()
    }


def _setting(config: Any, *names: str, default: Any = None) -> Any:
    """The first of `names` that the config or one of its sub-configs sets."""
    subs = [getattr(config, key, None) for key in getattr(config, "sub_configs", {})]
    for one in (config, *subs):
        for name in names:
            if getattr(one, name, None) is not None:
                return getattr(one, name)
    return default


def _text(config: Any, random: torch.Generator) -> dict[str, torch.Tensor]:
    size = _setting(config, "vocab_size", default=100)
    special = {value for key, value in config.to_dict().items() if key.endswith("token_id") and isinstance(value, int)}
    usual = torch.tensor([i for i in range(min(size, 1000)) if i not in special] or [0])
    ids = usual[torch.randint(len(usual), (SAMPLES, TOKENS), generator=random)]
    mask = torch.ones(SAMPLES, TOKENS, dtype=torch.long)
    mask[-1, -2:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def _image(config: Any, random: torch.Generator) -> torch.Tensor:
    size = _setting(config, "image_size", default=32)
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    return torch.randn(SAMPLES, _setting(config, "num_channels", default=3), height, width, generator=random)


def _spectrogram(config: Any, random: torch.Generator) -> torch.Tensor:
    bins = _setting(config, "num_mel_bins", default=80)
    return torch.randn(SAMPLES, bins, 2 * _setting(config, "max_source_positions", default=50), generator=random)
