"""Reports as tables to read, in a terminal and as Markdown."""

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from statistics import mean
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from ..blocks import Block, Refusal
from ..config import TWO_STREAMS, PruneConfig
from .plain import inline, printable
from .records import BlockReport, Change, Record, TaskMetric

# Characters of a line of words, at least.
_LEAST_WORDS = 16

_PREFIXES = {-3: "n", -2: "µ", -1: "m", 0: "", 1: "k", 2: "M", 3: "G", 4: "T"}

# Of ways to share out a size, so many are shown.
_ALTERNATIVES = 4


def summary_table(report: Record) -> Table:
    """The whole model before and after, as a rich table."""
    table = Table(title=printable(f"{report.architecture} pruned, {report.layout} layout"), title_justify="left")
    for name in ("", "before", "after", "ratio"):
        table.add_column(name, justify="left" if not name else "right")
    table.add_row("parameters", *change_row(report.parameters, 1e6, "M"))
    table.add_row("MACs a sample", *change_row(report.macs, 1e9, "G"))
    if report.latency is not None:
        *seconds, ratio = change_row(report.latency, 1e-3, "ms")
        table.add_row("latency", *seconds, ratio + _interval(report, "latency_ratio"))
    for metric in report.metrics:
        table.add_row(
            printable(f"{metric.name.replace('_', ' ')}, {metric.data}"),
            *metric.cells()[:2],
            f"{metric.value.ratio:.3f}",
        )
    for name, value in report.drift_figures.items():
        figure = f"{value:.4g}{_interval(report, name)}"
        table.add_row(printable(f"held-out {name.replace('_', ' ')}"), "", figure, "")
    measured = f"Latency: {in_words(report.measured_on)}. " if report.latency else ""
    caption = f"{measured}{calibrated_on(report.data)} Layout: {report.layout_reason}{_alternatives(report)}"
    if report.renewed_norms:
        caption += f". Running statistics of {report.renewed_norms} batch norms are those of the samples"
    table.caption = printable(caption)
    table.caption_justify = "left"
    return table


def _interval(report: Record, name: str) -> str:
    """That of a figure, to stand behind it."""
    ends = report.intervals.get(name)
    return "" if ends is None else f" [{ends[0]:.3g}, {ends[1]:.3g}]"


def _alternatives(report: Record) -> str:
    """How else the size could have been shared out, and what that was predicted to cost."""
    if report.allocation is None or len(report.allocation.alternatives) < 2:
        return ""
    first, *others = report.allocation.alternatives[:_ALTERNATIVES]
    compared = "; ".join(f"{widths}: {drift:.3g}" for widths, drift in others)
    return f". Predicted drift of {first[0]}: {first[1]:.3g}; of others: {compared}"


def block_table(report: Record) -> Table:
    """One row for each block that lost units, or for all experts of a layer, as a rich table."""
    table = Table(title="Blocks", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("block", no_wrap=True)
    for name in ("kept", "fitted", "held-out", "shrink", "optimum"):
        table.add_column(name, justify="right", no_wrap=True)
    pruned = [b for b in report.blocks if b.units_after < b.units_before]
    groups: dict[str, list[BlockReport]] = {}
    for b in pruned:
        groups.setdefault(b.name if b.stack is None else f"{b.stack}.*", []).append(b)
    for name, group in groups.items():
        b, shrinkages = group[0], [b.shrinkage for b in group if b.shrinkage is not None]
        guarantees = [b.guarantee for b in group if b.guarantee is not None]
        table.add_row(
            printable(name),
            f"{b.units_after}/{b.units_before}",
            f"{mean(b.fitted_error for b in group):.4f}",
            f"{mean(b.held_out_error for b in group):.4f}",
            "..".join(dict.fromkeys(f"{end(shrinkages):.2g}" for end in (min, max) if shrinkages)),
            f">={min(guarantees):.1%}" if guarantees else "",
        )
    whole = len(report.blocks) - len(pruned)
    table.caption = (
        "kept: units after and before. fitted, held-out: relative squared error of what the units' consumer "
        "computes, on the rows fitted on and on others. shrink: pull towards the original weights. optimum: the "
        "units kept capture at least this part of what any choice of as many could."
    )
    told = {name: report.config[name] for name in ("variant", "reweight") if name in report.config}
    if PruneConfig(**told).streams() in TWO_STREAMS:
        table.caption += " Errors include what earlier blocks have done to this one, as far as it cannot mend it."
    if len(groups) < len(pruned):
        table.caption += " Experts of a layer (*): mean errors, range of the pull, least bound."
    if whole:
        table.caption += f" Kept whole: {whole} further blocks."
    table.caption_justify = "left"
    return table


def render(*parts: Any, width: int = 120) -> str:
    """Rich renderables as plain text, in a notebook too, where a console would show them instead."""
    plain: dict[str, Any] = {"force_terminal": False, "force_jupyter": False, "color_system": None, "markup": False}
    console = Console(file=io.StringIO(), width=width, **plain)
    console.print(Group(*parts))
    return console.file.getvalue().rstrip("\n")  # type: ignore[attr-defined]


def markdown_table(table: Table | Text) -> str:
    """A rich table as a Markdown one, its caption as a paragraph below; the title is left to a heading.

    Anything else, such as the text that stands in for an empty table, is written as it is.
    """
    if not isinstance(table, Table):
        return render(table)
    rules = ["---:" if column.justify == "right" else "---" for column in table.columns]
    cells = zip(*(column.cells for column in table.columns), strict=True)
    rows: list[Iterable[object]] = [[column.header for column in table.columns], rules, *cells]
    lines = ["| " + " | ".join(inline(str(cell)).replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines) + (f"\n\n{inline(str(table.caption))}" if table.caption else "")


def found_table(architecture: str, parameters: int, blocks: Sequence[Block]) -> Table:
    """What can be pruned: a row for each block, or for all experts of a layer, as a rich table.

    Args:
        architecture: Class of the model.
        parameters: That it has.
        blocks: In forward order.
    """
    table = Table(title=f"Prunable blocks of {architecture}", title_justify="left")
    for name in ("block", "kind", "units", "parameters"):
        table.add_column(name, justify="left" if name in ("block", "kind") else "right", no_wrap=True)
    rows: dict[str, list[Block]] = {}
    for block in blocks:
        rows.setdefault(block.stack or block.name, []).append(block)
    for group in rows.values():
        name, units = group[0].name, str(group[0].units)
        if group[0].queries is not None:
            units += f" (queries: {group[0].queries.units})"
        if group[0].stack is not None:
            name, units = f"{group[0].stack}.*", f"{len(group)} x {units}"
        table.add_row(name, group[0].kind, units, f"{sum(block.parameters for block in group):,}")
    inside = sum(block.parameters for block in blocks)
    table.caption = f"{inside:,} of {parameters:,} parameters ({inside / parameters:.0%})"
    table.caption_justify = "left"
    return table


def html_table(table: Table) -> str:
    """A rich table as one of HTML, its title above and its caption below, as a notebook shows it."""

    def row(tag: str, cells: Iterable[object]) -> str:
        sides = (' style="text-align: right"' if column.justify == "right" else "" for column in table.columns)
        marked = (f"<{tag}{side}>{escape(str(cell))}</{tag}>" for side, cell in zip(sides, cells, strict=True))
        return f"<tr>{''.join(marked)}</tr>"

    heads = [column.header for column in table.columns]
    cells = zip(*(column.cells for column in table.columns), strict=True)
    rows = "".join([row("th", heads), *(row("td", one) for one in cells)])
    caption = f"<p>{escape(str(table.caption))}</p>" if table.caption else ""
    return f"<b>{escape(str(table.title or ''))}</b><table>{rows}</table>{caption}"


def refusal_table(refusals: Sequence[Refusal]) -> Table | Text:
    """What is left whole, why, and what to do, as a rich table."""
    if not refusals:
        return Text("Nothing was refused.")
    table = Table(title="Left whole", title_justify="left")
    for name in ("block", "kind", "reason", "what you can do"):
        short = name in ("block", "kind")
        table.add_column(name, overflow="fold", no_wrap=short, min_width=None if short else _LEAST_WORDS)
    for r in refusals:
        table.add_row(*map(printable, (r.name, r.kind, r.reason, r.advice)))
    return table


def metric_table(metrics: Sequence[TaskMetric]) -> Table:
    """Figures of a labelled task, as a rich table.

    Args:
        metrics: On the same data.
    """
    table = Table(title=printable(f"{metrics[0].task} on {metrics[0].data}"), title_justify="left")
    for name in ("", "original", "pruned", "change"):
        table.add_column(name, justify="right" if name else "left")
    for metric in metrics:
        table.add_row(printable(metric.name.replace("_", " ")), *metric.cells())
    table.caption = f"In brackets: 95% intervals of the paired bootstrap over {metrics[0].samples} samples."
    table.caption_justify = "left"
    return table


def example_table(metrics: Sequence[TaskMetric]) -> Table | None:
    """What a task's samples are, and what the original and the pruned model make of them; `None` without examples.

    Args:
        metrics: On the same data.
    """
    examples = metrics[0].examples if metrics else ()
    if not examples:
        return None
    table = Table(title=printable(f"{metrics[0].data}, side by side"), title_justify="left")
    for name in ("right", "original", "pruned"):
        table.add_column(name, overflow="fold")
    for example in examples:
        table.add_row(*map(printable, example))
    return table


def in_words(measured_on: Mapping[str, Any]) -> str:
    """What a latency was measured on: batch, length, device and threads."""
    length, threads = measured_on.get("length"), measured_on.get("threads")
    parts = [f"batch {measured_on.get('batch_size')}", f"length {length}" if length else "", measured_on.get("device")]
    return ", ".join(filter(None, [*parts, f"{threads} thread" + "s" * (threads != 1)]))


def calibrated_on(data: Mapping[str, Any]) -> str:
    """How much a model was calibrated on, and how much of it was cut or is padding, as a sentence."""
    tokens = f", {data['fit_tokens']} tokens" if data.get("fit_tokens") else ""
    shares = "".join(f", {data[name]:.1%} {name}" for name in ("cut", "padded") if name in data)
    return f"Fitted on {data.get('fit_samples')} samples{tokens}{shares}."


def with_unit(value: float, unit: str = "") -> str:
    """A figure of three digits with the prefix of its size: `2.02 s`, `22.7 M`."""
    shown = float(f"{value:.3g}")
    power = 0 if shown == 0 else min(max(math.floor(math.log10(abs(shown)) / 3), -3), 4)
    return f"{shown / 1000.0**power:.3g} {_PREFIXES[power]}{unit}".rstrip()


def change_row(change: Change, scale: float = 1.0, unit: str = "") -> tuple[str, str, str]:
    """Cells before, after and ratio of a table; values are shown in `unit`, which is `scale` of theirs."""
    before, after = (f"{value / scale:.4g} {unit}".rstrip() for value in (change.before, change.after))
    return before, after, f"{change.ratio:.3f}"
