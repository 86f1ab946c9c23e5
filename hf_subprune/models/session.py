"""A model that is worked on: what cannot be, and the one place that sets it up and puts it back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.prune import BasePruningMethod
from transformers import PreTrainedModel

from ..blocks import some_of
from .forms import apart
from .linears import is_convolution, linear_of
from .offload import taken_over, without_values
from .precision import precise_products
from .quantized import is_unpacked
from .running import evaluating, forward_replaced, input_device, inside, modules_by_path

_WITH_EXTREMES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@contextmanager
def session(
    model: PreTrainedModel, *, folder: Path | None = None, precise: bool = True, whole: bool = False
) -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """Within the context a model can be observed and shrunk; what then comes back is as it was set up before.

    Products are those of `precise_products`, weights that accelerate offloaded are placeholders (`taken_over`), every
    module is in evaluation mode, no autocast is on, and what `forms` understands is apart.

    Args:
        model: One that `check_prunable` lets pass.
        folder: Where new weights of offloaded layers are written; they stay in memory without one.
        precise: Without, products are the caller's: a generator that hands the model over in between sets up
            `precise_products` around its own work only.
        whole: Leave stacked experts and the like as the model stores them.

    Yields:
        What makes a context within which the model is as somebody else knows it: offloaded weights are accelerate's.

    Raises:
        ValueError: on exit, experts of one layer have different widths.
    """
    with (
        own_forward(model),
        precise_products(model.parameters()) if precise else nullcontext(),
        taken_over(modules_by_path(model), getattr(model, "all_tied_weights_keys", {}), folder) as handed_over,
        evaluating(model),
        nullcontext() if whole else apart(inside(model)),
    ):
        yield handed_over


@contextmanager
def own_forward(model: nn.Module) -> Iterator[None]:
    """Without autocast, neither around the caller nor, as accelerate puts it, around the model's forward.

    Moments and proofs need full precision.
    """
    wrapped, original = model.__dict__.get("forward"), model.__dict__.get("_original_forward")
    off = (torch.autocast(kind, enabled=False) for kind in {"cpu", input_device(model).type} - {"meta"})
    with ExitStack() as stack:
        for context in off:
            stack.enter_context(context)
        if wrapped is None or original is None:
            yield
        else:
            with forward_replaced(model, original):
                yield


def check_prunable(model: Any, offloaded: bool = False) -> None:
    """Refuse what cannot be pruned, before any work.

    Args:
        model: Anything.
        offloaded: Whether accelerate may read weights from elsewhere when they are needed.

    Raises:
        TypeError: not a `PreTrainedModel`.
        ValueError: quantized, PEFT-wrapped, compiled, on the meta device, made in inference mode or given within it,
            with weights that are computed anew for every forward, or with a weight that is NaN; the message says what
            to do instead.
    """
    if hasattr(model, "peft_config"):
        raise ValueError(
            f"{type(model).__name__} carries PEFT adapters: merge them first (`model = model.merge_and_unload()`), "
            "then prune the merged model."
        )
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"`model` must be a transformers.PreTrainedModel, got {type(model).__name__}. A wrapper holds one, mostly "
            "as its attribute `model`: pass that."
        )
    method = getattr(model, "quantization_method", "unknown method")
    if getattr(model, "is_quantized", False) and not is_unpacked(model, method):
        raise ValueError(
            f"{type(model).__name__} is quantized ({getattr(method, 'value', method)}): prune the full-precision "
            "checkpoint, then quantize the pruned one."
        )
    if compiled := [name or type(model).__name__ for name, module in model.named_modules() if _is_compiled(module)]:
        raise ValueError(f"{some_of(compiled)} is compiled: load the model anew, prune it, and call `compile` then.")
    if computed := [name for name, module in model.named_modules() if _computes_weight(module)]:
        raise ValueError(
            f"The weight of {some_of(computed)} is computed from other tensors for every forward, as a mask of "
            "torch.nn.utils.prune or a parametrization does: make it permanent first, with "
            "torch.nn.utils.prune.remove(module, 'weight') or "
            "torch.nn.utils.parametrize.remove_parametrizations(module, 'weight')."
        )
    if torch.is_inference_mode_enabled() or any(p.is_inference() for p in model.parameters()):
        raise ValueError(
            "Pruning takes gradients, which torch.inference_mode() rules out: load and prune the model outside of it."
        )
    if missing := without_values(dict(model.named_modules())):
        raise ValueError(f"Parameter {missing[0]} is on the meta device and has no values: load the weights first.")
    on_meta = next((name for name, p in model.named_parameters() if p.is_meta), None)
    if on_meta is not None and not offloaded:
        raise ValueError(f"Parameter {on_meta} is offloaded: load the whole model into memory for this.")
    if missing := [name for name, p in model.named_parameters() if _holds_nan(p)]:
        raise ValueError(
            f"Parameters hold NaN: {some_of(missing)}. Nothing that is computed with them means anything: load the "
            "weights anew, or train again from before they did."
        )


def _is_compiled(module: nn.Module) -> bool:
    """By its own `compile`, by `torch.compile` of its forward, or by that of the module, which then holds it."""
    forward = module.__dict__.get("forward")
    by_compile = module._compiled_call_impl is not None or hasattr(forward, "_torchdynamo_orig_callable")
    return by_compile or "_orig_mod" in module._modules


def _computes_weight(module: Any) -> bool:
    """Whether a layer computes its weight for every forward, and not as speech models normalise their convolutions."""
    if any(isinstance(hook, BasePruningMethod) for hook in module._forward_pre_hooks.values()):
        return True
    if is_convolution(module):
        return is_parametrized(module) and not all(
            isinstance(part, _WeightNorm) for parts in module.parametrizations.values() for part in parts
        )
    return linear_of(module) is not None and "weight" not in module._parameters


def _holds_nan(parameter: nn.Parameter) -> bool:
    """Extremes pass on NaN, and unlike `isnan` they take no memory of the size of the parameter."""
    if parameter.is_meta or parameter.dtype not in _WITH_EXTREMES or parameter.numel() == 0:
        return False
    return bool(torch.stack(parameter.detach().aminmax()).isnan().any())
