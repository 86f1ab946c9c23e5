"""Parameters that are replaced by others, and what modules remember of theirs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .linears import linear_of
from .offload import put_away, stored

APART = "_taken_apart"
"""Attribute of a module that is taken apart now: its form, see `forms`."""


def caches(attributes: Mapping[str, Any]) -> list[tuple[str, dict]]:
    """Plain dictionaries in which a module keeps what it computed from its parameters, by name, of its attributes."""
    return [(name, value) for name, value in attributes.items() if "cache" in name and type(value) is dict]


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
    linear = linear_of(module)
    if linear is not None:
        return linear.sizes(weight)
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
