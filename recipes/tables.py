"""How the recipes print their figures."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from hf_subprune.evaluation.tasks import Trial


def before_and_after(trial: Trial, model: PreTrainedModel) -> dict[str, str]:
    """The figure of a trial as cells of a row: before, after and change, each with its 95% interval."""
    (metric,) = trial.score(model)
    before, after, change = metric.cells()
    return {f"{metric.name} before": before, "after": after, "change": change}


def print_table(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows of the same columns; numbers to the right, fractions with four figures."""
    table = Table(title=title, title_justify="left")
    for name, value in rows[0].items():
        table.add_column(name, justify="left" if isinstance(value, str) else "right")
    for row in rows:
        table.add_row(*(f"{value:,.4g}" if isinstance(value, float) else str(value) for value in row.values()))
    console = Console()
    Console(width=max(console.width, 120)).print(table)
