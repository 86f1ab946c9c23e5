"""Forwards of a model on a batch: placed, hooked, stopped half-way, and without a trace on the model; its modules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from inspect import signature
from typing import Any, NoReturn

import torch
from torch import nn
from torch.utils._pytree import tree_map
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import ModelOutput

from .offload import device_of, stored
from .paths import ancestors_of
from .precision import fast_products
from .weights import caches

Batch = dict[str, Any]

Watch = tuple[str, Callable[..., Any]]
"""Dotted path of a module, and what to call."""


def inside(model: nn.Module) -> list[nn.Module]:
    """All modules inside of a model, each once; not the model itself."""
    return list(model.modules())[1:]


def modules_by_path(model: nn.Module) -> dict[str, nn.Module]:
    """All modules of a model, itself under the path `""` among them, under each of their names."""
    return dict(model.named_modules(remove_duplicate=False))


def around(model: nn.Module, path: str) -> dict[str, nn.Module]:
    """By dotted path, from the model itself inwards: the modules that one at `path` lies in."""
    return {outer: model.get_submodule(outer) for outer in ancestors_of(path)[:-1]}


def encoder_of(model: nn.Module) -> str | None:
    """Dotted path of the encoder of a model that has a decoder, too."""
    both = isinstance(model, PreTrainedModel) and model.config.is_encoder_decoder
    encoder = model.get_encoder() if both else None  # type: ignore[operator]
    return next((path for path, module in model.named_modules() if path and module is encoder), None)


@contextmanager
def generating_plainly(model: PreTrainedModel) -> Iterator[None]:
    """Within it `generate` does what it is given: what that leaves open is not filled in from the model's settings."""
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def goes_on_with_text(model: PreTrainedModel) -> bool:
    """Whether a model is a causal language model: it reads text from left to right, and can go on with it."""
    return model.can_generate() and not model.config.is_encoder_decoder and model.main_input_name == "input_ids"


def input_device(model: nn.Module) -> torch.device:
    """Where a model's inputs go: to its first parameter."""
    return next((device_of(parameter) for parameter in model.parameters()), torch.device("cpu"))


def is_offloaded(model: nn.Module) -> bool:
    """Whether some weights of a model are placeholders."""
    return any(stored(parameter) is not None for parameter in model.parameters())


class Reached(BaseException):
    """Ends a forward at the module that was asked for; not an `Exception`, so that no model code swallows it."""


def stop() -> NoReturn:
    """End the forward in which this is called, from a hook; its output is then not computed."""
    raise Reached


def call(model: nn.Module, batch: Batch) -> Any:
    """The model's forward on a batch, on the model's device, without gradients or key/value cache.

    Returns `None` when the forward was stopped on purpose.
    """
    with torch.no_grad():
        try:
            return model(**placed(model, batch))
        except Reached:
            return None


def placed(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """Arguments of the model's forward, on the model's device, without key/value cache."""
    arguments = on_device(model, batch)
    if "use_cache" in signature(model.forward).parameters:
        arguments.setdefault("use_cache", False)
    return arguments


@contextmanager
def hooked(
    model: nn.Module,
    *,
    inputs: Iterable[Watch] = (),
    outputs: Iterable[Watch] = (),
    arguments: Iterable[Watch] = (),
) -> Iterator[None]:
    """Within the context, functions are called whenever modules are, in the order in which they are given.

    Args:
        model: Holds the modules.
        inputs: Called with the first argument of a module, before it runs.
        outputs: Called with what a module returned; what they return in its place, unless `None`, replaces it.
        arguments: Called with the tuple of positional and the dict of named arguments, before a module runs; two of
            the kind that they return in their place, unless `None`, replace them.
    """
    with ExitStack() as stack:
        for path, hook in [*((p, _all(f)) for p, f in arguments), *((p, _first(f)) for p, f in inputs)]:
            stack.callback(model.get_submodule(path).register_forward_pre_hook(hook, with_kwargs=True).remove)
        for path, function in outputs:
            stack.callback(model.get_submodule(path).register_forward_hook(_output(function)).remove)
        yield


def _first(function: Callable[..., Any]) -> Callable[..., None]:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        function(args[0] if args else next(iter(kwargs.values()), None))

    return hook


def _all(function: Callable[..., Any]) -> Callable[..., Any]:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return function(args, kwargs)

    return hook


def _output(function: Callable[..., Any]) -> Callable[..., Any]:
    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        return function(output)

    return hook


@contextmanager
def forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Another forward for the time being; the module's hooks stay."""
    had = module.__dict__.get("forward")  # accelerate's hooks put a forward on the instance, too
    module.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        if had is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = had


def said_again(module: nn.Module, output: Callable[[], Any]) -> AbstractContextManager[None]:
    """Within it a module does not run but puts out a copy of what `output` returns; what follows may write into it."""
    return forward_replaced(module, lambda *_args, **_kwargs: copied(output()))


@contextmanager
def uncached(model: nn.Module) -> Iterator[None]:
    """Within it, forwards keep no keys and values unless told to: by the configs, as some take no argument."""
    configs: list[Any] = [module.config for module in model.modules() if hasattr(module, "config")]
    caching = [config for config in configs if getattr(config, "use_cache", False)]
    try:
        for config in caching:
            config.use_cache = False
        yield
    finally:
        for config in caching:
            config.use_cache = True


_SHRINKING = ("past_key_values", "cache", "attentions", "router_logits", "aux_loss")


@contextmanager
def stateless(model: nn.Module) -> Iterator[None]:
    """On exit, tensors that modules keep between forwards as plain attributes (recurrent states) are as before."""
    states = [
        (vars(module), {n: v for n, v in vars(module).items() if v is None or type(v) is torch.Tensor})
        for module in model.modules()
    ]
    try:
        yield
    finally:
        for attributes, state in states:
            attributes.update(state)


def copied(tree: Any) -> Any:
    """What a forward takes or gives, with tensors of its own: what follows may write into them."""
    return tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, tree)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; every module gets its own flag back."""
    training = [(module, module.training) for module in model.modules()]
    if any(flag for _, flag in training):
        model.eval()
    try:
        yield
    finally:
        for module, flag in training:
            if module.training != flag:
                module.training = flag


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; on exit training flags, buffers, `requires_grad` and the RNG are as before."""
    modules = list(model.modules())
    buffers = [(module._buffers, dict(module._buffers)) for module in modules if module._buffers]
    values = [
        (buffer, buffer.clone())
        for _, before in buffers
        for buffer in before.values()
        if buffer is not None and buffer.device.type != "meta"
    ]
    trainable = [(p, p.requires_grad) for module in modules for p in module._parameters.values() if p is not None]
    cached = [(module, name, value) for module in modules for name, value in caches(vars(module))]
    with torch.random.fork_rng(), torch.inference_mode(False), stateless(model), evaluating(model):
        try:
            for module, name, _ in cached:
                setattr(module, name, {})
            yield
        finally:
            for module, name, cache in cached:
                setattr(module, name, cache)
            for parameter, flag in trainable:
                if parameter.requires_grad != flag:
                    parameter.requires_grad_(flag)
            for entries, before in buffers:
                entries.clear()
                entries.update(before)
            with torch.no_grad():
                for buffer, value in values:
                    if not torch.equal(buffer, value):
                        buffer.copy_(value)


def floating_tensors(output: Any) -> Iterator[torch.Tensor]:
    """Every floating tensor in a model's output, through tuples, lists and mappings, but not in caches.

    Key/value caches and attention maps have one entry per head, and what routers say one per expert: they shrink with
    the model.
    """
    if isinstance(output, torch.Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        for key, value in output.items():
            if not any(name in key for name in _SHRINKING):
                yield from floating_tensors(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from floating_tensors(value)


def first_line(error: Exception) -> str:
    """What went wrong, in one line."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


def forward_outputs(model: PreTrainedModel, batch: Batch) -> Mapping[str, Any]:
    """What a forward in evaluation mode returns, by name, without key/value cache."""
    with undisturbed(model), fast_products(model.parameters()), torch.no_grad():
        return as_mapping(model(**placed(model, batch)))


def as_mapping(output: Any) -> Mapping[str, Any]:
    """The output of a forward by name: a mapping as it is, a tuple by position, a tensor under `"0"`."""
    if isinstance(output, Mapping):
        return output
    values = [output] if isinstance(output, torch.Tensor) else output
    return ModelOutput({str(i): value for i, value in enumerate(values)})


def on_device(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """Arguments of the model's forward, on the model's device."""
    device = input_device(model)
    if device.type == "meta":  # weights are offloaded, and accelerate's hooks move the inputs
        return dict(batch)
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
