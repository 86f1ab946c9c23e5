"""Dotted paths of modules."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

from torch import nn

Modules = Mapping[str, nn.Module]
"""The modules of a model by dotted path, itself under `""`."""


def ancestors_of(path: str) -> list[str]:
    """`"a.b.c"` -> `["", "a", "a.b", "a.b.c"]`."""
    parts = path.split(".")
    return [".".join(parts[:i]) for i in range(len(parts) + 1)]


def is_inside(path: str, outer: str) -> bool:
    return outer == "" or path.startswith(outer + ".")


def layer_of(modules: Modules, path: str) -> str | None:
    """Dotted path of the outermost element of a `ModuleList` or `Sequential` that holds `path`, if one does.

    Args:
        modules: Of the model.
        path: Of a module.
    """
    for outer, inner in pairwise(ancestors_of(path)):
        if isinstance(modules[outer], (nn.ModuleList, nn.Sequential)):
            return inner
    return None
