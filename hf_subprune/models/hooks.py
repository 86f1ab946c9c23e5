"""Functions that look at what modules take and put out while a forward runs, or change it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

Watch = tuple[str, Callable[..., Any]]
"""Dotted path of a module, and what to call."""


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
        arguments: Called with the tuple of positional and the dict of named arguments, before a module runs.
    """
    with ExitStack() as stack:
        for path, function in arguments:
            stack.callback(
                model.get_submodule(path).register_forward_pre_hook(_all(function), with_kwargs=True).remove
            )
        for path, function in inputs:
            hook = model.get_submodule(path).register_forward_pre_hook(_first(function), with_kwargs=True)
            stack.callback(hook.remove)
        for path, function in outputs:
            stack.callback(model.get_submodule(path).register_forward_hook(_output(function)).remove)
        yield


def _first(function: Callable[..., Any]) -> Callable[..., None]:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        function(args[0] if args else next(iter(kwargs.values()), None))

    return hook


def _all(function: Callable[..., Any]) -> Callable[..., None]:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        function(args, kwargs)

    return hook


def _output(function: Callable[..., Any]) -> Callable[..., Any]:
    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        return function(output)

    return hook
