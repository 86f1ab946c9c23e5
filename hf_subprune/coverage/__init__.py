"""Tiny models of every architecture of the installed Transformers, and what becomes of each when it is pruned.

Takes model types; gives a `Row` for each with its heads (blocks that shrink exactly, refusals, how it is stored and
loads again), and all of them as JSON, as a table and in a sentence.
"""

from .survey import KindOutcome, Row, survey
from .table import summary, to_json, to_markdown
from .tiny import CannotBuildError, tiny_model

__all__ = ["CannotBuildError", "KindOutcome", "Row", "summary", "survey", "tiny_model", "to_json", "to_markdown"]
