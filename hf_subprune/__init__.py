"""Structured pruning of pretrained Hugging Face Transformers from a few hundred unlabeled samples.

A floor imports only from those that are named after it, which `tests/test_house.py` reads here and asserts:

- Run from: `cli`; this `__init__`; `bench`.
- Joined: `training`, `checkpoint`, `demo`, `sizes`, over `pruning`, the five stages in their order; `serving`.
- The stages: `solving`, `allocation`, `routing`, `collection`, `evaluation`, `coverage`, `discovery`.
- Told and stored: `report`, `loading`, `storage`.
- Read and cut: `data`, `surgery`.
- Below: `models`, a torch model in itself; `blocks`; `runs`, what a run keeps; `config`; `solver`, tensors only.

What each folder takes and gives stands in its `__init__`, the words in .github/CONTRIBUTING.md.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .storage.on_import import when_imported

if TYPE_CHECKING:
    from .checkpoint import prune_checkpoint
    from .config import PruneConfig
    from .data.generation import generated_text
    from .pruning import prune, prune_sizes
    from .report.report import PruneReport
    from .report.saving import save_pruned
    from .serving.export import export
    from .training.callback import SubpruneCallback
    from .training.recovery import recover

__all__ = [
    "PruneConfig",
    "PruneReport",
    "SubpruneCallback",
    "export",
    "generated_text",
    "prune",
    "prune_checkpoint",
    "prune_sizes",
    "recover",
    "save_pruned",
]

# Imported when they are first asked for: they bring in torch and Transformers.
_LAZY = {
    "PruneConfig": "config",
    "PruneReport": "report.report",
    "SubpruneCallback": "training.callback",
    "export": "serving.export",
    "generated_text": "data.generation",
    "prune": "pruning",
    "prune_checkpoint": "checkpoint",
    "prune_sizes": "pruning",
    "recover": "training.recovery",
    "save_pruned": "report.saving",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version(__name__)
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({"__version__", *__all__, *(name for name in globals() if name.startswith("__"))})


# `from_pretrained` learns to read the ragged layout, whether Transformers was imported before or comes after.
when_imported("transformers.modeling_utils", lambda: importlib.import_module(".loading", __name__))
