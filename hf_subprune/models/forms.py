"""What a model stacks in one tensor, taken apart into ordinary linears for as long as it is worked on.

That is the projections of all experts of a layer (`experts`), and those of queries, keys and values in
`nn.MultiheadAttention` (`multihead`). Experts that are modules of their own are watched besides (`listed`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from torch import nn

from . import experts, listed, multihead

_FORMS = (experts, multihead, listed)


def take_apart(model: nn.Module) -> list[nn.Module]:
    """Take apart all stacks of weights whose computation is understood; a second time does nothing.

    The `forward` of their modules is replaced; nothing is copied.

    Returns:
        The modules that were taken apart.
    """
    found = [form.understood(module) for module in model.modules() for form in _FORMS]
    modules = [held for held in found if held is not None]
    for held in modules:
        held.attach()
    return [held.module for held in modules]


def put_together(modules: Iterable[nn.Module]) -> Callable[[], None]:
    """Put linears back into stacked tensors: the very parameters that they were views of, unless they were shrunk.

    Args:
        modules: Among them those to be put together; others are passed over.

    Returns:
        Takes them apart again, into the very modules that they were.

    Raises:
        ValueError: the experts of one module have different widths.
    """
    found = [form.apart_in(module) for module in modules for form in _FORMS]
    taken = [held for held in found if held is not None]
    parameters = [held.together() for held in taken]
    for held, own in zip(taken, parameters, strict=True):
        held.detach(own)

    def again() -> None:
        for held in taken:
            held.attach()

    return again


@contextmanager
def apart(model: nn.Module) -> Iterator[None]:
    """Within the context all stacked weights of the model that are understood are those of ordinary linears.

    On exit they are stacked again: what was shrunk keeps its new width. Within another such context, nothing is done.

    Raises:
        ValueError: on exit, experts of one layer have different widths.
    """
    modules = take_apart(model)
    try:
        yield
    finally:
        put_together(modules)


@contextmanager
def together(model: nn.Module) -> Iterator[None]:
    """Within the context the model is as it is stored, and as fast: nothing is apart."""
    again = put_together(model.modules())
    try:
        yield
    finally:
        again()
