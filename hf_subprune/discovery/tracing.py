"""One forward in which every linear's output is a fresh leaf: what each linear reads, and from which leaves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ..models.linears import feature_axis, input_dim, is_linear
from ..models.running import copied, floating_tensors, hooked, undisturbed

OUTPUT = "the model's output"
"""Reader name of what the model returns."""


@dataclass(eq=False)
class Read:
    """One call of a linear, or one tensor that the model returns.

    Args:
        reader: Dotted path of the linear, or `OUTPUT`.
        tensor: What it reads, features last; its graph ends at the leaves that the linears before it put out.
    """

    reader: str
    tensor: torch.Tensor


@dataclass(eq=False)
class Source:
    """A tensor that a linear's input can depend on: another linear's output, or a parameter outside the linears.

    Args:
        name: Dotted path of the linear, or of the parameter (or of a buffer of a frozen batch norm).
        tensor: The leaf of the graph.
        axis: Axis of the features for a linear's output; `None` for a parameter, whose axes are all candidates.
        readers: Linears that depend on it (`OUTPUT` among them if the model's output does).
    """

    name: str
    tensor: torch.Tensor
    axis: int | None
    readers: set[str] = field(default_factory=set)


@dataclass(eq=False)
class Trace:
    """The cut graph of one forward.

    Args:
        reads: In the order of the forward, outputs last.
        sources: For each read, the sources that it depends on.
    """

    reads: list[Read]
    sources: list[list[Source]]


def linears_in(model: nn.Module) -> dict[str, nn.Module]:
    """The linears that are part of a model, by dotted path."""
    return {path: module for path, module in model.named_modules() if module is not model and is_linear(module)}


@contextmanager
def traced(model: nn.Module, inputs: Mapping[str, Any]) -> Iterator[Trace]:
    """Run the model once with every linear's output replaced by a fresh random leaf that requires a gradient.

    Each linear then reads a tensor that depends on the linears just before it and on nothing further up. The graph
    lives as long as the context; on exit the model is as it was.

    Args:
        model: The model.
        inputs: Keyword arguments of its forward.
    """
    # Tensors made in inference mode cannot be part of a graph; clones of them can.
    with torch.inference_mode(False):
        inputs = copied(dict(inputs))
    linears = linears_in(model)
    reads: list[Read] = []
    leaves: list[Source] = []
    random = torch.Generator().manual_seed(0)

    def record(name: str, module: nn.Module, given: torch.Tensor) -> None:
        # A clone, as a later in-place operation on the input would change what its graph says.
        reads.append(Read(name, given.clone().movedim(feature_axis(module), -1)))

    def cut(name: str, module: nn.Module, output: Any) -> Any:
        if not isinstance(output, torch.Tensor):
            return output  # a subclass that does more, such as a router
        leaf = _fresh(output, random).requires_grad_()
        leaves.append(Source(name, leaf, feature_axis(module)))
        # A clone again: an in-place operation on a leaf is an error.
        return leaf.clone()

    inputs_of = [(name, partial(record, name, module)) for name, module in linears.items()]
    outputs_of = [(name, partial(cut, name, module)) for name, module in linears.items()]
    with undisturbed(model), torch.enable_grad():
        parameters = []
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point() and parameter.numel() > 0:
                parameter.requires_grad_(True)
                parameters.append(Source(name, parameter, None))
        parameters += _factors(model)
        with hooked(model, inputs=inputs_of, outputs=outputs_of), _Connected():
            output = model(**inputs)
        reads.extend(Read(OUTPUT, tensor) for tensor in floating_tensors(output))
        yield _connected(reads, [*leaves, *parameters])


class _Connected(TorchFunctionMode):
    """Functions with flat pieces are replaced by smooth ones: a unit that is dead in a forward is still connected.

    Scores that a finite mask pushes down come closer: gradients through `exp(-100)` vanish for some, at random.
    Parts that a model runs without gradients are recorded as well.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch._C._set_grad_enabled:
            args = (True,)
        kwargs = kwargs or {}
        if func in _SMOOTH:
            return _SMOOTH[func](args[0] if args else kwargs["input"])
        if func in _SCORES:
            place, name = _SCORES[func]
            if len(args) > place:
                args = (*args[:place], _near(args[place]), *args[place + 1 :])
            elif name in kwargs:
                kwargs = {**kwargs, name: _near(kwargs[name])}
        return func(*args, **kwargs)


_SMOOTH: dict[Any, Any] = {
    **dict.fromkeys((torch.relu, torch.relu_, torch.Tensor.relu, torch.Tensor.relu_), functional.softplus),
    **dict.fromkeys(
        (functional.relu, functional.relu_, functional.relu6, functional.hardtanh, functional.hardtanh_),
        functional.softplus,
    ),
    functional.hardswish: functional.silu,
    functional.hardsigmoid: functional.sigmoid,
}
_SCORES: dict[Any, tuple[int, str]] = {
    **dict.fromkeys((torch.softmax, torch.Tensor.softmax, functional.softmax), (0, "input")),
    functional.scaled_dot_product_attention: (3, "attn_mask"),
}
"""Where functions take scores, or what is added to them: position and name of the argument."""


def _near(scores: Any) -> Any:
    """Scores of which none is so far below the others that its weight underflows, but for those at `-inf`."""
    floating = isinstance(scores, torch.Tensor) and scores.is_floating_point()
    return scores.asinh() if floating else scores


def _factors(model: nn.Module) -> list[Source]:
    """Buffers that scale features, as fresh leaves in the buffers' places.

    They are those of batch norms that were written out in tensor operations (what PyTorch's own does with its running
    statistics cannot be differentiated), and those beside a linear that are as long as its output.
    """
    sources = []
    for path, module in model.named_modules():
        norm = "running_mean" in module._buffers and not isinstance(module, nn.modules.batchnorm._BatchNorm)
        lengths = {child.weight.shape[1 - input_dim(child)] for child in module.children() if is_linear(child)}
        for name, buffer in module._buffers.items():
            if buffer is None or not buffer.is_floating_point():
                continue
            if norm or (buffer.shape[-1:].numel() == buffer.numel() and buffer.numel() in lengths):
                module._buffers[name] = buffer.detach().clone().requires_grad_()
                sources.append(Source(f"{path}.{name}", module._buffers[name], None))
    return sources


def _fresh(output: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """Random values in the place of a linear's output: one half of the positions positive, the other negative.

    Absolute values in [0.5, 1.5] stay clear of the saturated ends of gates, and values of one sign side by side bring
    every rectifier to its live side in one half, whatever the sign of a convolution between.
    """
    values = torch.rand(output.shape, generator=random).add_(0.5)
    batch = next((axis for axis, size in enumerate(output.shape) if size > 1), 0)
    values.narrow(batch, 0, output.shape[batch] // 2).neg_()
    return values.to(output.device, output.dtype)


def _connected(reads: list[Read], sources: list[Source]) -> Trace:
    """Which sources each read depends on, from one walk over the autograd graph."""
    bits = {id(source.tensor): 1 << i for i, source in enumerate(sources)}
    reach: dict[Any, int] = {None: 0}

    def walk(root: Any) -> int:
        stack = [root]
        while stack:
            node = stack[-1]
            if node in reach:
                stack.pop()
                continue
            following = [function for function, _ in node.next_functions]
            waiting = [function for function in following if function not in reach]
            if waiting:
                stack.extend(waiting)
                continue
            variable = getattr(node, "variable", None)
            reach[node] = bits.get(id(variable), 0)
            for function in following:
                reach[node] |= reach[function]
            stack.pop()
        return reach[root]

    dependencies = []
    for read in reads:
        found = walk(read.tensor.grad_fn)
        dependencies.append([source for i, source in enumerate(sources) if found >> i & 1])
        for source in dependencies[-1]:
            source.readers.add(read.reader)
    return Trace(reads, dependencies)
