"""What is left whole besides the candidates that were refused, and why."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from ..blocks import Block, Refusal
from ..models.experts import SECOND, Expert
from ..models.linears import is_convolution, is_linear
from ..models.paths import Modules

LEFT_WHOLE = "Nothing is needed: it is left whole and the other blocks can be pruned."
NO_ATTRIBUTE = (
    "It is left whole and the other blocks can be pruned: its forward computes with all of its units, in a norm over "
    "them or with a number of heads or a width that no attribute of its modules says."
)


def functional_products(
    modules: Modules, layers: Mapping[str, str], readers: Iterable[str], blocks: Sequence[Block]
) -> list[Refusal]:
    """Refuse what multiplies by matrices otherwise than through linears, such as a function given their weights.

    Args:
        modules: Of the model.
        layers: By path of a module, the repeated layer that it is in.
        readers: Sources that something depends on: the weight of a linear that is called is no source.
        blocks: That were found; a router beside them is not worth a refusal.
    """
    found = {piece.tensor for block in blocks for piece in block.slices}
    refusals = {}
    for name in readers:
        path, _, leaf = name.rpartition(".")
        module = modules[path] if leaf.endswith("weight") else None
        if module is None or isinstance(module, nn.Embedding) or path not in layers:
            continue
        parameter = module._parameters.get(leaf)
        if parameter is not None and parameter.ndim == 2:
            around = path.rpartition(".")[0]
            if any(tensor.startswith(f"{around}.") for tensor in found):
                continue
            owner = around if is_linear(module) else path
            reason = f"{type(module).__name__} {name!r} is multiplied by other code than the forward of a linear"
            refusals[owner] = Refusal(owner, "unknown", reason, LEFT_WHOLE)
    return list(refusals.values())


def grouped_convolutions(modules: Modules, layers: Iterable[str], blocks: Sequence[Block]) -> list[Refusal]:
    """Refuse the convolutions in groups that no block slices: they are no linears, and end what is followed.

    Args:
        modules: Of the model.
        layers: Modules in repeated layers.
        blocks: That were found.
    """
    found = {piece.tensor for block in blocks for piece in block.slices}
    refusals = []
    for path in layers:
        module: Any = modules[path]
        depthwise = is_convolution(module) and module.weight.shape[1] == 1
        if is_convolution(module) and module.groups > 1 and not depthwise and f"{path}.weight" not in found:
            reason = f"it is a convolution in {module.groups} groups, each of which reads channels of its own"
            refusals.append(Refusal(path, "unknown", reason, LEFT_WHOLE))
    return refusals


def unread_modules(layers: Container[str], names: set[str], blocks: Sequence[Block]) -> list[Refusal]:
    """Refuse the modules with several linears that run, but that nothing depends on: their reader may need a GPU.

    Args:
        layers: Modules in repeated layers.
        names: Of the linears that run and that nothing depends on.
        blocks: That were found.
    """
    found = {piece.tensor.rpartition(".")[0] for block in blocks for piece in block.slices}
    paths = Counter(name.rpartition(".")[0] for name in names - found if name in layers)
    reason = "nothing in this forward depends on what its linears put out, or by a choice alone, such as a top-k"
    return [Refusal(path, "unknown", reason, LEFT_WHOLE) for path in sorted(paths) if paths[path] > 1]


def unreached_modules(modules: Modules, ran: set[str], readers: set[str], blocks: Sequence[Block]) -> list[Refusal]:
    """Refuse the modules with linears that the batch did not run while it ran others like them: experts.

    Args:
        modules: Of the model.
        ran: Linears that a forward calls.
        readers: Those that a trace calls, in which routers may choose others.
        blocks: That were found.
    """
    found = {piece.tensor.rpartition(".")[0]: block.kind for block in blocks for piece in block.slices}
    like = {_numberless(name): "whole" for name in ran | readers} | {_numberless(name): found[name] for name in found}
    silent = {
        name.rpartition(".")[0]: like[_numberless(name)]
        for name, module in modules.items()
        if name not in found and name not in ran & readers and _numberless(name) in like
        if is_linear(module) and not is_convolution(module)
    }
    reason = "the probe batch does not reach it, as it reaches others like it"
    advice = "It is left whole. Pass `inputs` of more tokens to look for it."
    return [Refusal(path, kind, reason, advice) for path, kind in silent.items()]


def _numberless(path: str) -> str:
    return re.sub(r"(?<![a-zA-Z])\d+", "*", path)  # "layers.0", "expert_0", and not "fc1"


def whole_stacks(modules: Modules, blocks: Sequence[Block]) -> tuple[list[Block], list[Refusal]]:
    """Leave out experts that can be shrunk while others, stored in the same tensors, cannot."""
    kept: list[Block] = []
    refusals = []
    found = Counter(block.stack for block in blocks)
    for block in blocks:
        stack = block.stack
        if stack is None or found[stack] == sum(isinstance(part, Expert) for part in modules[stack].children()):
            kept.append(block)
        else:
            reason = f"other experts of {stack!r}, which must keep equally many units, cannot be shrunk"
            refusals.append(Refusal(block.name, block.kind, reason, "Nothing is needed: it is left whole."))
    return kept, refusals


def refuse_stacks(modules: Modules, layers: Mapping[str, str], blocks: Iterable[Block]) -> list[Refusal]:
    """Refuse the modules in repeated layers that stack weights in a way that is not understood.

    Args:
        modules: Of the model, its experts taken apart.
        layers: By path of a module, the repeated layer that it is in.
        blocks: That were found; what they slice is understood.
    """
    known = {piece.tensor for block in blocks for piece in block.slices}
    refusals = []
    for path, layer in layers.items():
        module = modules[path]
        stacks = [name for name, parameter in module._parameters.items() if _is_stack(module, parameter)]
        if not stacks or path == layer or any(f"{path}.{name}" in known for name in stacks):
            continue
        shapes = ", ".join(f"{name} {tuple(module.get_parameter(name).shape)}" for name in stacks)
        if "forward" in module.__dict__:
            reason = f"the forward of the module that stacks {shapes} was replaced, as a device map does"
            advice = "Load the model on one device to prune its experts; without them nothing is needed."
        else:
            reason = f"{type(module).__name__} stacks {shapes}, and what it computes with them is not understood"
            advice = "Nothing is needed: it is left whole and the other blocks can be pruned."
        refusals.append(Refusal(path, "mlp" if SECOND in stacks else "unknown", reason, advice))
    return refusals


def _is_stack(module: nn.Module, parameter: nn.Parameter | None) -> bool:
    """Whether a parameter holds several matrices; kernels of convolutions do not count."""
    if parameter is None or isinstance(module, nn.modules.conv._ConvNd):
        return False
    return parameter.is_floating_point() and sum(size > 1 for size in parameter.shape) > 2
