"""Blocks that keep no unit: what goes besides their units, and why some must keep one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import torch
from torch import nn

from ..blocks import Block
from ..models.linears import input_dim, is_linear


def never_run(model: nn.Module, block: Block) -> Iterator[tuple[str, torch.Tensor, int]]:
    """What else the linears hold that are not run without the block's units, such as keys that all heads share.

    Args:
        model: The model.
        block: A removable block of it.

    Yields:
        Dotted path of a parameter, the parameter, and its dimension of outputs.
    """
    holders = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    for bypass in block.bypasses:
        for name, module in model.get_submodule(bypass.module).named_modules():
            path = f"{bypass.module}.{name}".removesuffix(".")
            if is_linear(module) and path != block.consumer:
                for leaf, parameter in module._parameters.items():
                    if parameter is not None and holders[id(parameter)] == 1:
                        yield f"{path}.{leaf}", parameter, 1 - input_dim(module) if leaf == "weight" else 0


def why_it_stays(block: Block) -> str:
    """Why a block cannot go, for a message."""
    if block.stack is not None:
        return f"it is an expert of those stored together in {block.stack!r}"
    if block.sets > 1:
        return "its units are the query heads of key/value heads, which would stay; remove the block of these"
    if block.kind == "channels":
        return "without channels a convolution is no layer that adds nothing"
    return "the model does not compute the same without it as with all of its units masked"
