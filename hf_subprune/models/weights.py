"""Parameters that are replaced by others, and what modules remember of theirs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .offload import put_away, stored


def caches(module: nn.Module) -> list[tuple[str, dict]]:
    """Plain dictionaries in which `module` keeps what it computed from its parameters, by attribute name."""
    return [(name, value) for name, value in vars(module).items() if "cache" in name and type(value) is dict]


def sizes(module: nn.Module) -> dict[str, Any]:
    """Sizes that `module` must remember to agree with its parameters, e.g. `{"in_features": 12, "out_features": 4}`.

    Args:
        module: A module whose own parameters may have been replaced by smaller ones.

    Returns:
        Attribute values by name; empty for modules that remember no size.
    """
    weight = module._parameters.get("weight")
    if weight is None:
        return {}
    if isinstance(module, nn.Linear):
        return {"out_features": weight.shape[0], "in_features": weight.shape[1]}
    if isinstance(module, Conv1D):
        return {"nx": weight.shape[0], "nf": weight.shape[1]}
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        groups = weight.shape[0] // (module.out_channels // module.groups) if module.groups > 1 else 1
        return {"out_channels": weight.shape[0], "in_channels": weight.shape[1] * groups, "groups": groups}
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return {"num_features": weight.shape[0]}
    if isinstance(module, nn.GroupNorm):
        channels = module.num_channels // module.num_groups
        return {"num_channels": weight.shape[0], "num_groups": weight.shape[0] // channels}
    if isinstance(module, nn.Embedding):
        return {"num_embeddings": weight.shape[0], "embedding_dim": weight.shape[1]}
    return {}


def parameter_like(original: nn.Parameter, values: torch.Tensor) -> nn.Parameter:
    """A parameter of other values and shape, with the flags and marks of the original."""
    values = put_away(values, original)
    parameter = nn.Parameter(values, requires_grad=original.requires_grad)
    # Marks that transformers leaves on parameters, such as `_is_hf_initialized`.
    parameter.__dict__.update(original.__dict__)
    if stored(values) is not None:
        parameter.__dict__["_stored"] = stored(values)
    return parameter
