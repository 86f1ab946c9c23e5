"""Plots of pruning reports, as PNG. matplotlib is imported when one is drawn (`pip install hf_subprune[plots]`)."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .families import families, numbers, pruned, spread
from .records import PLOTS, BlockReport, Change, Record
from .tables import in_words, with_unit

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colour-blind safe: what was, what is, what was measured on unseen rows.
BEFORE, AFTER, UNSEEN, BOUND = "#c9ced6", "#2f6db5", "#d1495b", "#4a4a4a"
LINES = (AFTER, UNSEEN, "#3a9d7c", "#e09f3e", "#7b5ea7")
GUARANTEE = "≥: of the objective that any choice of as many units could reach, those kept reach at least this part"
MOST_LABELS = 16  # beside one another
# Drift of the original from itself, by figure.
_OF_THE_ORIGINAL = {"relative_error": 0.0, "kl": 0.0, "top1_agreement": 1.0, "cosine": 1.0, "embedding_cosine": 1.0}
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8a8f98",
    "axes.labelcolor": "#33383f",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#e8eaee",
    "xtick.color": "#33383f",
    "ytick.color": "#33383f",
    "legend.frameon": False,
    "figure.dpi": 160,
}


def save_plots(report: Record, folder: str | Path) -> dict[str, Path]:
    """Draw every plot that the report has the figures for.

    Args:
        report: From `prune`.
        folder: Made if need be.

    Returns:
        Path of the PNG per title, in the order to show them.

    Raises:
        ImportError: matplotlib is not installed.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    figures = [plot_cost(report)]
    if pruned(report):
        figures += [plot_kept(report), plot_error(report)]
    if any(b.curve for b in report.blocks):
        figures.append(plot_curves(report))
    for figure, name in zip(figures, PLOTS.values(), strict=False):
        figure.savefig(folder / name)
    return {title: folder / name for (title, name), _ in zip(PLOTS.items(), figures, strict=False)}


def plot_cost(report: Record) -> "Figure":
    """Parameters, multiply-accumulates and latency, before and after."""
    costs: list[tuple[str, Change, str]] = [("Parameters", report.parameters, ""), ("MACs a sample", report.macs, "")]
    if report.latency is not None:
        costs.append(("Latency", report.latency, "s"))
    with _figure(9, 2.5) as figure:
        for axes, (title, change, unit) in zip(figure.subplots(1, len(costs)), costs, strict=True):
            values = [change.before, change.after]
            bars = axes.barh(["before", "after"], values, color=[BEFORE, AFTER], height=0.62)
            axes.bar_label(bars, [with_unit(value, unit) for value in values], padding=4)
            axes.set_title(f"{title}: {change.ratio:.0%}")
            axes.set_xlim(0, 1.35 * max(values))
            axes.invert_yaxis()
            axes.xaxis.set_visible(False)
            axes.spines["bottom"].set_visible(False)
            axes.tick_params(left=False, labelleft=axes is figure.axes[0])
            axes.grid(False)
        if report.latency is not None:
            text = f"Latency: median of a forward, {in_words(report.measured_on)}"
            figure.supxlabel(text, fontsize=8.5, color="#6b7078", x=0.01, ha="left")
    return figure


def plot_kept(report: Record) -> "Figure":
    """Share of the units kept in each block, by depth, one panel per family of blocks."""
    found = families(report.blocks)
    with _figure(9, 0.6 + 2.1 * len(found)) as figure:
        panels = figure.subplots(len(found), 1, squeeze=False)[:, 0]
        for axes, (name, blocks) in zip(panels, found.items(), strict=True):
            depth = range(len(blocks))
            kept = [100 * b.units_after / b.units_before for b in blocks]
            axes.bar(depth, [100] * len(blocks), color=BEFORE, width=0.8, label="removed")
            bars = axes.bar(depth, kept, color=AFTER, width=0.8, label="kept")
            if len(blocks) <= MOST_LABELS:
                counts = [str(b.units_after) for b in blocks]
                axes.bar_label(bars, counts, padding=-13, fontsize=8.5, color="white")
            axes.set_ylim(0, 100)
            axes.set_ylabel("units kept, %")
            units = sorted({b.units_before for b in blocks})
            axes.set_title(f"{name}  ({' or '.join(map(str, units))} units before)")
            _depth_axis(axes, blocks)
        _legend(figure)
    return figure


def plot_error(report: Record) -> "Figure":
    """Relative error of each pruned block by depth, fitted and held-out, and how near to the best choice it is."""
    found = families(pruned(report))
    with _figure(9, 0.9 + 2.4 * len(found)) as figure:
        panels = figure.subplots(len(found), 1, squeeze=False)[:, 0]
        for axes, (name, blocks) in zip(panels, found.items(), strict=True):
            depth = range(len(blocks))
            fitted, unseen = [b.fitted_error for b in blocks], [b.held_out_error for b in blocks]
            axes.vlines(depth, fitted, unseen, color=BEFORE, linewidth=3, zorder=1)
            axes.plot(depth, fitted, "o", color=AFTER, label="rows fitted on")
            axes.plot(depth, unseen, "o", color=UNSEEN, markerfacecolor="white", mew=1.6, label="rows held out")
            if len(blocks) <= MOST_LABELS:
                for x, block in enumerate(blocks):
                    _write_guarantee(axes, block, x, max(fitted[x], unseen[x]))
            axes.set_ylim(0, 1.25 * max(*fitted, *unseen, 1e-6))
            axes.set_ylabel("relative error")
            axes.set_title(name)
            _depth_axis(axes, blocks)
        _legend(figure, GUARANTEE if any(axes.texts for axes in panels) else None)
    return figure


def plot_curves(report: Record) -> "Figure":
    """Relative error of a block's output against its units kept, and what was chosen, both fitted and held-out.

    One row of panels per family of blocks; of a deep family, six blocks at equal distances. The curves are those of
    the block alone in the original model; what was chosen is above them where the variant makes later blocks mend what
    earlier ones have done, which they cannot in full.
    """
    found = families([b for b in report.blocks if b.curve])
    shown = {name: spread(blocks, 6) for name, blocks in found.items()}
    columns = max(map(len, shown.values()))
    with _figure(max(9, 1.2 + 1.75 * columns), 0.8 + 2.3 * len(shown)) as figure:
        grid = figure.subplots(len(shown), columns, sharex="row", sharey="row", squeeze=False)
        for row, (name, blocks) in zip(grid, shown.items(), strict=True):
            for axes, block, number in zip(row, blocks, numbers(blocks), strict=False):
                units, fitted, unseen = zip(*block.curve, strict=True)
                axes.plot(units, fitted, color=AFTER, linewidth=1.4, label="pruned alone, rows fitted on")
                axes.plot(units, unseen, color=UNSEEN, linewidth=1.4, label="pruned alone, rows held out")
                if block.units_after < block.units_before:
                    chosen, errors = block.units_after, (block.fitted_error, block.held_out_error)
                    axes.plot(chosen, errors[0], "o", color=AFTER, label="chosen, rows fitted on")
                    held_out = {"markerfacecolor": "white", "mew": 1.6, "label": "chosen, rows held out"}
                    axes.plot(chosen, errors[1], "o", color=UNSEEN, **held_out)
                    _write_guarantee(axes, block, chosen, max(errors))
                axes.set_yscale("log")
                axes.minorticks_off()
                axes.set_title(number, loc="center", fontsize=9, fontweight="normal")
                axes.locator_params(axis="x", nbins=3)
                axes.set_xlabel("units kept", fontsize=9)
            for axes in row[len(blocks) :]:
                axes.set_visible(False)
            row[0].set_title(f"{name}\n")
            row[0].set_ylabel("relative error")
            row[0].set_ylim(bottom=max(row[0].get_ylim()[0], 1e-5))
            row[0].set_xlim(0, 1.05 * max(block.units_before for block in blocks))
        _legend(figure, GUARANTEE if any(axes.texts for axes in grid.flat) else None)
    return figure


def plot_tradeoff(reports: Mapping[str, Sequence[Record]], quality: str | None = None) -> "Figure":
    """Quality against size of several reports on one model.

    Args:
        reports: Reports per label; each label is a line.
        quality: Name of a task metric or of a figure of `drift`; the first that all reports have when left out.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there are no reports, or some lack `quality`.
    """
    everything = [report for line in reports.values() for report in line]
    if not everything:
        raise ValueError("A plot of size against quality needs at least one report.")
    shared = [name for name in _qualities(everything[0]) if all(name in _qualities(r) for r in everything)]
    name = quality or (shared[0] if shared else "")
    if name not in shared:
        raise ValueError(f"Not every report has the quality {name!r}; all of them have {', '.join(shared) or 'none'}.")
    with _figure(7, 4.4) as figure:
        axes = figure.subplots()
        for (label, line), colour in zip(reports.items(), itertools.cycle(LINES)):
            points = sorted((r.parameters.after / 1e6, _qualities(r)[name]) for r in line)
            axes.plot(*zip(*points, strict=True), "o-", color=colour, label=label)
        original = [
            (r.parameters.before / 1e6, m.value.before) for r in everything for m in r.metrics if m.name == name
        ]
        if name in _OF_THE_ORIGINAL:
            original = [(everything[0].parameters.before / 1e6, _OF_THE_ORIGINAL[name])]
        if original:
            axes.plot(*original[0], "D", color=BOUND, label="original")
        if _OF_THE_ORIGINAL.get(name) == 0:
            axes.set_ylim(bottom=0)
        axes.set_xlabel("parameters of the model, millions")
        axes.set_ylabel(name.replace("_", " "))
        axes.set_title(f"{everything[0].architecture}: size against quality")
        axes.grid(True, axis="both")
        axes.legend()
    return figure


def _qualities(report: Record) -> dict[str, float]:
    """Figures of the pruned model's quality by name, labelled tasks first."""
    return {**{metric.name: metric.value.after for metric in report.metrics}, **report.drift_figures}


@contextmanager
def _figure(width: float, height: float) -> Iterator["Figure"]:
    """A figure of `width` x `height` inches, in our style; no window system and no global state are touched.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Plots need matplotlib: `pip install hf_subprune[plots]`.") from error
    with rc_context(STYLE):
        yield Figure(figsize=(width, height), layout="constrained")


def _depth_axis(axes: "Axes", blocks: Sequence[BlockReport]) -> None:
    """Label positions 0, 1, ... by the numbers of the blocks, as many as there is room for."""
    ticks = range(0, len(blocks), -(-len(blocks) // MOST_LABELS))
    axes.set_xticks(ticks, [numbers(blocks)[i] for i in ticks])
    axes.set_xlim(-0.6, max(len(blocks), 6) - 0.4)
    axes.tick_params(axis="x", length=0)


def _write_guarantee(axes: "Axes", block: BlockReport, x: float, y: float) -> None:
    """The block's guarantee beside a point, if it has one."""
    if block.guarantee is not None:
        place: dict[str, Any] = {"xytext": (6, 4), "textcoords": "offset points", "fontsize": 8}
        axes.annotate(f"≥{math.floor(100 * block.guarantee)}%", (x, y), color=BOUND, **place)


def _legend(figure: "Figure", title: str | None = None) -> None:
    """One legend below all panels, each entry once."""
    entries: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    figure.legend(
        list(entries.values()),
        list(entries),
        loc="outside lower center",
        ncols=4,
        fontsize=9,
        title=title,
        title_fontsize=9,
    )
