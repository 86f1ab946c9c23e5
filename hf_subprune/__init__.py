"""Structured pruning of pretrained Hugging Face Transformers from a few hundred unlabeled samples.

A floor imports only from those that are named after it, which `tests/test_house.py` reads here and asserts:

- Run from: `cli`; this `__init__`; `bench`.
- Joined: `training`, `checkpoint`, `demo`, `sizes`, over `pruning`, the five stages in their order.
- The stages: `solving`, `allocation`, `routing`, `collection`, `evaluation`, `coverage`, `discovery`.
- Told and stored: `report`, `loading`, `storage`.
- Read and cut: `data`, `surgery`.
- Below: `models`, a torch model in itself; `blocks`; `runs`, what a run keeps; `config`; `solver`, tensors only.

What each folder takes and gives stands in its `__init__`, the words in .github/CONTRIBUTING.md.
"""

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

from . import loading  # registers the layout that `from_pretrained` reads  # noqa: F401
from .config import PruneConfig
from .pruning import prune, prune_sizes
from .report.report import PruneReport

if TYPE_CHECKING:
    from .checkpoint import prune_checkpoint
    from .data.generation import generated_text
    from .report.saving import save_pruned
    from .training.callback import SubpruneCallback
    from .training.recovery import recover

# Imported when they are first asked for: they bring in Trainer, or what reads models and data by name.
_LAZY = {
    "SubpruneCallback": "training.callback",
    "generated_text": "data.generation",
    "prune_checkpoint": "checkpoint",
    "recover": "training.recovery",
    "save_pruned": "report.saving",
}

__version__ = importlib.metadata.version("hf_subprune")

__all__ = [
    "PruneConfig",
    "PruneReport",
    "SubpruneCallback",
    "generated_text",
    "prune",
    "prune_checkpoint",
    "prune_sizes",
    "recover",
    "save_pruned",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
