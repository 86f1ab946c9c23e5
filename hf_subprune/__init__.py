"""Structured pruning of pretrained Hugging Face Transformers from a few hundred unlabeled samples.

Where to find what, in the order in which a run comes by:

- Asked for: `config`. Read: `datafiles`, `calibration`, `features`, `padding`, `decoding`.
- Found: `blocks`, by `probe` with `probe_inputs`, `tracing`, `units`, `attributes` and `ties`; the layers that it
  knows are in `linears` and `experts`.
- Collected: `moments`, by `collection`, which walks the model with `advance` and `taps`, and with `residuals`;
  `sensitivity`.
- Solved, on tensors only: `solver` joins `importance`, `selection` (on `elimination` and `swaps`), `certificates`,
  `reweighting` and `factorisation`; `tied` does so for blocks that keep the same units.
- Allocated: `targets`, `curves`, `budgets`, joined by `allocation`.
- Shrunk: `surgery`, proved by `verification`; whole experts: `routing`, `expert_removal`.
- Joined: `pruning` and `calibrated`; `sizes`, `checkpoint` (on `offload` and `durable`), `processes`, `execution`.
- Stored: `layout` (`stock`, `spec`, `skeleton`, `recast`), `loading`, `remote_code`, `saving`.
- Told: `report`, `plots`, `evaluation`, `comparison`, `tasks`, `metrics`, `card`, `hub`.
- Trained with: `callback`, `gradual`, `masking`, `schedules`, `recovery`.
- Run from: `cli`, `demo`, `bench`, `coverage`.
"""

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
    from .saving import save_pruned

# Imported when they are first asked for: they bring in Trainer, or what reads models and data by name.
_LAZY = {
    "SubpruneCallback": "callback",
    "prune_checkpoint": "checkpoint",
    "recover": "recovery",
    "save_pruned": "saving",
}

__all__ = [
    "PruneConfig",
    "PruneReport",
    "SubpruneCallback",
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
    return sorted({*globals(), *__all__})
