"""What is left whole besides the candidates that were refused, and why."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from ..blocks import Block, Refusal, by_stack
from ..models.experts import SECOND, Expert
from ..models.linears import is_convolution, is_linear
from ..models.paths import layer_of
from ..models.running import modules_by_path

LEFT_WHOLE = "Nothing is needed: it is left whole and the other blocks can be pruned."
NO_ATTRIBUTE = (
    "It is left whole and the other blocks can be pruned: its forward computes with all of its units, in a norm over "
    "them or with a number of heads or a width that no attribute of its modules says."
)


def functional_products(model: nn.Module, readers: Mapping[str, set[str]], blocks: Sequence[Block]) -> list[Refusal]:
    """Refuse what multiplies by matrices otherwise than through linears, such as a function given their weights.

    Args:
        model: The model.
        readers: By source, what depends on it: the weight of a linear that is called is no source.
        blocks: That were found; a router beside them is not worth a refusal.
    """
    modules = modules_by_path(model)
    found = {piece.tensor for block in blocks for piece in block.slices}
    refusals = {}
    for name in readers:
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path) if leaf.endswith("weight") else None
        if module is None or isinstance(module, nn.Embedding) or layer_of(modules, path) is None:
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


def grouped_convolutions(model: nn.Module, blocks: Sequence[Block]) -> list[Refusal]:
    """Refuse the convolutions in groups that no block slices: they are no linears, and end what is followed."""
    modules = modules_by_path(model)
    found = {piece.tensor for block in blocks for piece in block.slices}
    refusals = []
    for path, module in model.named_modules():
        depthwise = is_convolution(module) and module.weight.shape[1] == 1
        if is_convolution(module) and module.groups > 1 and not depthwise and f"{path}.weight" not in found:
            reason = f"it is a convolution in {module.groups} groups, each of which reads channels of its own"
            if layer_of(modules, path) is not None:
                refusals.append(Refusal(path, "unknown", reason, LEFT_WHOLE))
    return refusals


def unread_modules(model: nn.Module, names: set[str], blocks: Sequence[Block]) -> list[Refusal]:
    """Refuse the modules with several linears that run, but that nothing depends on: their reader may need a GPU."""
    modules = modules_by_path(model)
    found = {piece.tensor.rpartition(".")[0] for block in blocks for piece in block.slices}
    paths = Counter(name.rpartition(".")[0] for name in names - found if layer_of(modules, name) is not None)
    reason = "nothing in this forward depends on what its linears put out, or by a choice alone, such as a top-k"
    return [Refusal(path, "unknown", reason, LEFT_WHOLE) for path in sorted(paths) if paths[path] > 1]


def unreached_modules(model: nn.Module, ran: set[str], readers: set[str], blocks: Sequence[Block]) -> list[Refusal]:
    """Refuse the modules with linears that the batch did not run while it ran others like them: experts.

    Args:
        model: The model.
        ran: Linears that a forward calls.
        readers: Those that a trace calls, in which routers may choose others.
        blocks: That were found.
    """
    found = {piece.tensor.rpartition(".")[0]: block.kind for block in blocks for piece in block.slices}
    like = {_numberless(name): "whole" for name in ran | readers} | {_numberless(name): found[name] for name in found}
    silent = {
        name.rpartition(".")[0]: like[_numberless(name)]
        for name, module in model.named_modules()
        if is_linear(module) and not is_convolution(module)
        if name not in found and name not in ran & readers and _numberless(name) in like
    }
    reason = "the probe batch does not reach it, as it reaches others like it"
    advice = "It is left whole. Pass `inputs` of more tokens to look for it."
    return [Refusal(path, kind, reason, advice) for path, kind in silent.items()]


def _numberless(path: str) -> str:
    return re.sub(r"(?<![a-zA-Z])\d+", "*", path)  # "layers.0", "expert_0", and not "fc1"


def whole_stacks(model: nn.Module, blocks: Iterable[Block]) -> tuple[list[Block], list[Refusal]]:
    """Leave out experts that can be shrunk while others, stored in the same tensors, cannot."""
    kept: list[Block] = []
    refusals = []
    for group in by_stack(blocks):
        stack = group[0].stack
        if stack is None or len(group) == sum(
            isinstance(part, Expert) for part in model.get_submodule(stack).children()
        ):
            kept += group
        else:
            reason = f"other experts of {stack!r}, which must keep equally many units, cannot be shrunk"
            refusals += [
                Refusal(block.name, block.kind, reason, "Nothing is needed: it is left whole.") for block in group
            ]
    return kept, refusals


def refuse_stacks(model: nn.Module, blocks: Iterable[Block], layers: Iterable[str]) -> list[Refusal]:
    """Refuse the modules in repeated layers that stack weights in a way that is not understood.

    Args:
        model: The model, its experts taken apart.
        blocks: Found in it; what they slice is understood.
        layers: Dotted paths of the repeated layers.
    """
    known = {piece.tensor for block in blocks for piece in block.slices}
    inside = tuple(f"{layer}." for layer in layers)
    refusals = []
    for path, module in model.named_modules():
        stacks = [name for name, parameter in module._parameters.items() if _is_stack(module, parameter)]
        if not stacks or not path.startswith(inside) or any(f"{path}.{name}" in known for name in stacks):
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
