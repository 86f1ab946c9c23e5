"""Structured pruning of pretrained Hugging Face Transformers from a few hundred unlabeled samples."""

from . import loading  # registers the layout that `from_pretrained` reads  # noqa: F401
from .checkpoint import prune_checkpoint
from .config import PruneConfig
from .pruning import prune
from .report import PruneReport

__all__ = ["PruneConfig", "PruneReport", "prune", "prune_checkpoint"]
