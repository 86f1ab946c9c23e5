"""Compare importances, with and without new weights, and the paper's variants on one model."""

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table
from transformers import PreTrainedModel

from ..config import IMPORTANCES, VARIANTS, PruneConfig
from ..evaluation.tasks import Trial
from ..pruning import prune


def settings(
    keeps: Sequence[float],
    importances: Sequence[str] = IMPORTANCES,
    variants: Sequence[str] = VARIANTS,
    base: PruneConfig | None = None,
) -> Iterator[PruneConfig]:
    """Every combination; without new weights the variants are the same, so only the first one is run.

    Args:
        keeps: Kept fractions.
        importances: Of `PruneConfig.importance`.
        variants: Of `PruneConfig.variant`.
        base: What the combinations have in common.
    """
    common = (base or PruneConfig()).to_dict()
    for keep in keeps:
        for importance in importances:
            for reweight in (True, False):
                for variant in variants if reweight else variants[:1]:
                    changed = {"keep": keep, "importance": importance, "reweight": reweight, "variant": variant}
                    yield PruneConfig.from_dict({**common, **changed})


def bench_quality(
    model: PreTrainedModel,
    data: list[Any],
    configs: Sequence[PruneConfig],
    processing_class: Any = None,
    trial: Trial | None = None,
    progress: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """Prune a copy of `model` once per config.

    Args:
        model: Left as it is.
        data: To calibrate on; drift is measured on what each config holds out of it.
        configs: From `settings`.
        processing_class: As for `prune`.
        trial: A task on unseen data to score each pruned model on; none when left out.
        progress: Called after each config.

    Returns:
        One row per config: `keep`, `importance`, `reweight`, `variant`, `block_error` (mean relative error of the
        pruned blocks on held-out rows), `drift` (see `evaluation.drift.Drift`), `metrics` (with `trial`; see
        `report.records.TaskMetric`), `seconds` of selection and calibration.
    """
    rows = []
    for config in configs:
        pruned = copy.deepcopy(model)
        start = time.perf_counter()
        report = prune(pruned, data, config, processing_class)
        seconds = time.perf_counter() - start - report.seconds["evaluation"]
        errors = [b.held_out_error for b in report.blocks if b.units_after < b.units_before]
        row: dict[str, Any] = {
            "keep": config.keep,
            "importance": config.importance,
            "reweight": config.reweight,
            "variant": config.variant,
            "block_error": sum(errors) / len(errors),
            "drift": report.drift,
            "seconds": seconds,
        }
        if trial is not None:
            row["metrics"] = {metric.name: asdict(metric) for metric in trial.score(pruned)}
        rows.append(row)
        progress()
    return rows


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """The rows as a rich table."""
    figures = [name for name in rows[0]["drift"] if name != "rows"]
    shown = Table(title="Quality by importance, reweighting and variant", title_justify="left")
    metrics = rows[0].get("metrics", {})
    for name in ("keep", "importance", "new weights", "variant", "block error", *figures, *metrics, "seconds"):
        left = name in ("importance", "new weights", "variant")
        shown.add_column(name.replace("_", " "), justify="left" if left else "right")
    for row in rows:
        cells = [str(row["keep"]), row["importance"], "yes" if row["reweight"] else "no"]
        cells += [row["variant"] if row["reweight"] else "", f"{row['block_error']:.4f}"]
        cells += [f"{row['drift'][name]:.4f}" for name in figures]
        cells += [f"{row['metrics'][name]['value']['after']:.4g}" for name in metrics]
        shown.add_row(*cells, f"{row['seconds']:.1f}")
    if metrics:
        dense = (f"{name.replace('_', ' ')} {metric['value']['before']:.4g}" for name, metric in metrics.items())
        shown.caption = f"The dense model: {', '.join(dense)}."
        shown.caption_justify = "left"
    return shown


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Drift of the output against the kept fraction, a line per importance; dashed without new weights.

    Where there is one fraction only, the importances are side by side.

    Raises:
        ImportError: matplotlib is missing.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    importances = list(dict.fromkeys(row["importance"] for row in rows))
    several = len({row["keep"] for row in rows}) > 1
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: (not row["reweight"], row["keep"])):
        way = _way(row)
        lines.setdefault(f"{row['importance']}, {way}" if several else way, []).append(row)
    for label, line in lines.items():
        way = _way(line[0])
        color = importances.index(line[0]["importance"]) if several else list(_MARKERS).index(way)
        style = "" if not several else "-" if line[0]["reweight"] else "--"
        axes.plot(
            [row["keep"] if several else row["importance"].replace("_", "\n") for row in line],
            [row["drift"]["relative_error"] for row in line],
            color=f"C{color}",
            linestyle=style,
            marker=_MARKERS[way],
            label=label,
        )
    axes.set_xlabel("kept fraction" if several else f"importance, kept fraction {rows[0]['keep']:g}")
    axes.set_ylabel("relative error of the output, held out")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


_MARKERS = {"layer": "o", "seq": "s", "asym": "^", "residual": "D", "old weights": "x"}


def _way(row: dict[str, Any]) -> str:
    return row["variant"] if row["reweight"] else "old weights"
