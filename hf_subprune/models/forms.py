"""Forms in which a model holds weights that are no ordinary linears, or calls linears for a part of what it is given.

For as long as a model is worked on, its forms are *apart*: made of linears that are found, verified and shrunk like
any other. There are the experts of a layer stacked in one tensor (`experts`), experts that are modules of their own in
a list (`listed`), and queries, keys and values stacked in `nn.MultiheadAttention` (`multihead`). A further form is a
class that has what `Form` says, in `FORMS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from torch import nn

from .experts import StackedExperts
from .listed import ListedExperts
from .multihead import StackedAttention
from .weights import APART

if TYPE_CHECKING:
    from typing import Self  # of Python 3.11


class Form(Protocol):
    """What one module is made of while it is apart, and what puts it together again.

    Attributes:
        every: Whether parts also run on what they are not given, which then counts with weight 0. Without meaning for
            a form whose parts run on everything.
    """

    every: bool

    @property
    def module(self) -> nn.Module:
        """The module. While it is apart, its attribute `APART` is the form."""

    @classmethod
    def understood(cls, module: nn.Module) -> Self | None:
        """The form of a module that is not apart, if it has this form and computes what its parts do; it stays whole.

        Nothing is copied: the weights of the parts are views of the module's.
        """

    def attach(self) -> None:
        """Put the parts, as they are now, in the place of what the module held."""

    def together(self) -> dict[str, nn.Parameter | None]:
        """All parameters that the module holds once it is together: the very ones that it had if no part was shrunk.

        Raises:
            ValueError: the parts do not fit together.
        """

    def detach(self, parameters: dict[str, nn.Parameter | None]) -> None:
        """Put `parameters`, which `together` returned, in the place of the parts; `attach` takes it apart again."""


FORMS: tuple[type[Form], ...] = (StackedExperts, StackedAttention, ListedExperts)
"""All that there are."""


def take_apart(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Take apart all modules whose form is understood; a second time does nothing.

    Args:
        modules: Those that are looked at, each once.

    Returns:
        The modules that were taken apart.
    """
    found = [form.understood(module) for module in modules if APART not in vars(module) for form in FORMS]
    taken = [form for form in found if form is not None]
    _attach(taken)
    return [form.module for form in taken]


def put_together(modules: Iterable[nn.Module]) -> Callable[[], None]:
    """Put modules that are apart together: with the very parameters that they had, unless parts were shrunk.

    Args:
        modules: Among them those to be put together; others are passed over.

    Returns:
        Takes them apart again, into the very modules that they were.

    Raises:
        ValueError: the experts of one module have different widths.
    """
    taken: list[Form] = [vars(module)[APART] for module in modules if APART in vars(module)]
    parameters = [form.together() for form in taken]
    for form, own in zip(taken, parameters, strict=True):
        form.detach(own)
        del vars(form.module)[APART]
    return lambda: _attach(taken)


def _attach(forms: Iterable[Form]) -> None:
    for form in forms:
        form.attach()
        vars(form.module)[APART] = form


@contextmanager
def apart(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Within the context all of the modules whose form is understood are apart.

    On exit they are together again: what was shrunk keeps its new width. Within another such context, nothing is done.

    Raises:
        ValueError: on exit, experts of one layer have different widths.
    """
    taken = take_apart(modules)
    try:
        yield
    finally:
        put_together(taken)


@contextmanager
def together(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Within the context none of the modules is apart: the model is as it is stored, and as fast."""
    again = put_together(modules)
    try:
        yield
    finally:
        again()


@contextmanager
def all_running(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Within the context experts run on tokens that they were not sent, so that a small batch shows all of them.

    Those that were taken apart run on every token, those of a list on every token if they would get none. The output
    of the model is the same: what the router did not ask for counts with weight 0.

    Args:
        modules: Those of a model that is apart.
    """
    held: list[Form] = [vars(module)[APART] for module in modules if APART in vars(module)]
    before = [form.every for form in held]
    for form in held:
        form.every = True
    try:
        yield
    finally:
        for form, every in zip(held, before, strict=True):
            form.every = every
