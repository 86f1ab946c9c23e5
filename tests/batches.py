"""Ready calibration batches for tiny models, with padding where there are tokens."""

import torch
from transformers import PreTrainedModel

from hf_subprune.probe_inputs import probe_inputs


def ready_batches(model: PreTrainedModel, count: int = 6, rows: int = 4, seed: int = 0) -> list[dict]:
    """`count` different batches of `rows` samples for any family of `tiny`."""
    like = probe_inputs(model)
    generator = torch.Generator().manual_seed(seed)
    return [{name: _another(name, value, rows, generator) for name, value in like.items()} for _ in range(count)]


def _another(name: str, like: torch.Tensor, rows: int, generator: torch.Generator) -> torch.Tensor:
    shape = (rows, *like.shape[1:])
    if "mask" in name:
        mask = torch.ones(shape, dtype=like.dtype)
        if mask.ndim == 2:
            for row in range(rows):
                mask[row, mask.shape[1] - row % 3 :] = 0
        return mask
    if like.is_floating_point():
        return torch.randn(shape, generator=generator)
    return torch.randint(5, int(like.max()) + 1, shape, generator=generator)
