"""Dotted paths of modules."""

from __future__ import annotations

from torch import nn


def ancestors_of(path: str) -> list[str]:
    """`"a.b.c"` -> `["", "a", "a.b", "a.b.c"]`."""
    parts = path.split(".")
    return [".".join(parts[:i]) for i in range(len(parts) + 1)]


def is_inside(path: str, outer: str) -> bool:
    return outer == "" or path.startswith(outer + ".")


def layer_of(model: nn.Module, path: str) -> str | None:
    """Dotted path of the outermost element of a `ModuleList` or `Sequential` that holds `path`, if one does."""
    module: nn.Module = model
    parts = path.split(".")
    for i, part in enumerate(parts):
        if isinstance(module, (nn.ModuleList, nn.Sequential)):
            return ".".join(parts[: i + 1])
        module = getattr(module, part)
    return None
