"""Where a consumer's output is added to the residual stream."""

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from ..blocks import Block
from ..data.batches import Samples
from ..models.experts import is_expert
from ..models.linears import feature_axis
from ..models.running import Watch, hooked, modules_by_path, placed, undisturbed
from .segments import Plan

# Names of classes that divide each token by its size: `LayerNorm`, `LlamaRMSNorm`, `T5LayerNorm`.
_TOKEN_NORM = re.compile(r"(Layer|RMS)_?Norm", flags=re.IGNORECASE)

# Relative size below which a gain, what else is added, or a difference between rows, is taken for zero.
_NEGLIGIBLE = 1e-3


@dataclass(frozen=True, eq=False)
class Addition:
    """A tensor that is `gain * output + rest` of a consumer, whose rest does not depend on the consumer.

    Args:
        path: Dotted path of a module.
        is_input: Whether it is the module's first input; its output otherwise.
        gain: What each feature of the consumer's output is multiplied by, in the shape that broadcasts to it.
        normed: Whether what reads the sum is first divided by its size, token by token.
        only_normed: Whether that is so of all that reads it, what is added to it later included (post-norm).
    """

    path: str
    is_input: bool
    gain: torch.Tensor
    normed: bool = False
    only_normed: bool = False

    def rest(self, value: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """What has been added to the consumer's output, in the output's units, in float32; zero where the gain is."""
        gain, value, output = self.gain.to(value.device).float(), value.float(), output.float()
        live = gain.abs() > _NEGLIGIBLE * gain.abs().max()
        return torch.where(live, (value - gain * output) / torch.where(live, gain, 1), 0)


def find_additions(samples: Samples, plan: Plan) -> dict[str, Addition]:
    """By block name, the first tensor behind the consumer that is its output with something added.

    One forward and some short backwards show it: there, and only there, the derivative by the consumer's output is the
    same diagonal matrix for all rows while the values differ. Blocks for which there is none have no entry: their
    output is normalised first, as in Gemma 2, or reordered, their consumer is called again before it is added, as in
    Pegasus-X, or they are experts, which see some of the tokens.

    Args:
        samples: Their short probe is run, in their model, in eval mode.
        plan: The segments; the addition lies in the block's segment.
    """
    found: dict[str, Addition] = {}
    model, modules = samples.model, modules_by_path(samples.model)
    norms = {path: module for path, module in modules.items() if _TOKEN_NORM.search(type(module).__name__)}
    normed = _normed_widths(norms.values())
    inputs: list[Watch] = []
    outputs: list[Watch] = []
    for segment in plan.segments:
        inside = [block for block in segment.blocks if not is_expert(modules, block.consumer)]
        axes = {block.consumer: feature_axis(modules[block.consumer]) for block in inside}
        watch = _Watch(inside, axes, norms.keys(), normed, found)
        for path, _ in modules[segment.path].named_modules(prefix=segment.path):
            inputs.append((path, watch.at_input(path)))
            outputs.append((path, watch.at_output(path)))
        outputs.append((segment.path, watch.cut))  # the layer's output is looked at, then cut off
    with undisturbed(model), torch.enable_grad(), hooked(model, inputs=inputs, outputs=outputs):
        model.requires_grad_(False)
        model(**placed(model, samples.short_probe))
    return found


def first_tensor(values: Any) -> torch.Tensor | None:
    """The first tensor of what a module takes or returns."""
    return next((x for x in tree_leaves(values) if isinstance(x, torch.Tensor)), None)


def _normed_widths(norms: Iterable[nn.Module]) -> set[int]:
    """Widths of the streams that some module divides by their size, as layer and RMS norms of any model do."""
    weights = (getattr(module, "weight", None) for module in norms)
    return {len(weight) for weight in weights if isinstance(weight, torch.Tensor) and weight.ndim == 1}


class _Watch:
    """Looks at every tensor in one segment, for those blocks whose consumer has been called."""

    def __init__(
        self,
        blocks: Sequence[Block],
        axes: Mapping[str, int],
        norms: Collection[str],
        normed: Collection[int],
        found: dict[str, Addition],
    ):
        self.consumers = {block.consumer: block.name for block in blocks}
        self.axes, self.norms, self.normed, self.found = axes, norms, normed, found
        self._norm_output: torch.Tensor | None = None
        self._outputs: dict[str, torch.Tensor] = {}
        self._seen: dict[str, set[tuple[str, bool]]] = {}
        self._ambiguous: set[str] = set()

    def at_input(self, path: str) -> Callable[[Any], None]:
        return partial(self._look, path, True)

    def at_output(self, path: str) -> Callable[[Any], Any]:
        def watched(output: Any) -> Any:
            if path in self.consumers and isinstance(output, torch.Tensor):
                leaf = output.detach().requires_grad_()
                if path in self._outputs:  # called again before the first output is added: which one would be found?
                    self._ambiguous.add(path)
                    del self._outputs[path]
                elif path not in self._ambiguous:
                    self._outputs[path] = leaf
                self._seen.setdefault(path, set())
                return leaf.clone()  # what follows may write into it
            self._look(path, False, output)
            if path in self.norms:
                self._norm_output = first_tensor(output)
            return output

        return watched

    def cut(self, output: Any) -> Any:
        """The graph ends with the segment. One that puts out what a norm does passes no sum on as it is."""
        self._outputs.clear()
        if self._norm_output is not None and first_tensor(output) is self._norm_output:
            names = set(self.consumers.values()) & set(self.found)
            self.found.update({name: replace(self.found[name], only_normed=True) for name in names})
        return tree_map(lambda x: x.detach() if isinstance(x, torch.Tensor) else x, output)

    def _look(self, path: str, is_input: bool, values: Any) -> None:
        value = first_tensor(values)
        for consumer in list(self._outputs):
            if (path, is_input) in self._seen[consumer]:
                continue  # only the first one behind the consumer counts
            self._seen[consumer].add((path, is_input))
            gain = None if value is None else self._gain(value, consumer)
            if value is None or gain is None:
                continue
            output = self._outputs[consumer].detach()
            addition = Addition(path, is_input, gain, value.shape[self.axes[consumer]] in self.normed)
            if addition.rest(value.detach(), output).abs().max() > _NEGLIGIBLE * output.abs().max():
                self.found[self.consumers[consumer]] = addition
                del self._outputs[consumer]

    def _gain(self, value: torch.Tensor, consumer: str) -> torch.Tensor | None:
        """The diagonal of the derivative, if it is diagonal, and the same for all rows."""
        output = self._outputs[consumer]
        if value.shape != output.shape or not value.requires_grad:
            return None
        signs = torch.randint(0, 2, value.shape, generator=torch.Generator().manual_seed(0)).to(value) * 2 - 1
        (gradient,) = torch.autograd.grad(value, output, signs, retain_graph=True, allow_unused=True)
        if gradient is None:
            return None
        diagonal = (gradient * signs).movedim(self.axes[consumer], -1)
        gain = diagonal.reshape(-1, diagonal.shape[-1])[0]
        if not (diagonal - gain).abs().max() <= _NEGLIGIBLE * gain.abs().max() or not gain.abs().max() > 0:
            return None
        return gain.view(-1, *[1] * (-1 - self.axes[consumer])).clone()
