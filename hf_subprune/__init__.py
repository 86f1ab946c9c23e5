"""Structured pruning of pretrained Hugging Face Transformers from a few hundred unlabeled samples."""

import importlib
from typing import TYPE_CHECKING, Any

from . import loading  # registers the layout that `from_pretrained` reads  # noqa: F401
from .config import PruneConfig
from .pruning import prune, prune_sizes
from .report import PruneReport

if TYPE_CHECKING:
    from .callback import SubpruneCallback
    from .checkpoint import prune_checkpoint
    from .recovery import recover

# Imported when they are first asked for: they bring in Trainer, or what reads models and data by name.
_LAZY = {"SubpruneCallback": "callback", "prune_checkpoint": "checkpoint", "recover": "recovery"}

__all__ = ["PruneConfig", "PruneReport", "SubpruneCallback", "prune", "prune_checkpoint", "prune_sizes", "recover"]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
