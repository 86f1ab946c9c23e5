"""Sizes that a configuration states, whatever its architecture calls them."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch


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

    def tokens(self, shape: Sequence[int], vocabulary: int) -> torch.Tensor:
        """Random ids, int64, of ordinary tokens among the first 1000 of a vocabulary."""
        special = {token for one in self.configs for token in special_ids(one)}
        usual = torch.tensor([i for i in range(min(vocabulary, 1000)) if i not in special] or [0])
        return usual[torch.randint(len(usual), tuple(shape), generator=self.random)]

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


def special_ids(config: Any) -> Iterator[int]:
    """Ids of special tokens that a config names."""
    for name, value in vars(config).items():
        if name.endswith(("token_id", "token_index", "_token_ids")):
            yield from (v for v in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(v, int))
