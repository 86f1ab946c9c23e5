"""Prune one model to several sizes, each saved in its own folder, with one table and one plot for all."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from transformers import PreTrainedModel

from .config import PruneConfig
from .pruning import prune_sizes
from .report.place import claimed
from .report.records import REPORT_NAME
from .report.report import PruneReport
from .report.saving import check_output, check_shard_size, save_to
from .runs.stages import SAVING, begin

PLOT_NAME = "sizes.png"


def save_sizes(
    folder: str | Path,
    model: PreTrainedModel,
    data: Any,
    configs: Sequence[PruneConfig],
    processing_class: Any = None,
    *,
    max_shard_size: int | str = "2GB",
    command: str = "",
) -> dict[Path, PruneReport]:
    """Prune to each config's size from one calibration and save each, and a plot of size against quality.

    Args:
        folder: Holds a folder for each size, such as `keep-0.5`, and `sizes.png` where matplotlib is installed.
        model: The same before and after.
        data: As for `prune`.
        configs: As for `prune_sizes`.
        processing_class: Saved beside each model; may be `None`.
        max_shard_size: Of one file of weights.
        command: Put into the reports.

    Returns:
        The report of each size by its folder.

    Raises:
        ValueError, OSError: as `check_sizes`, `check_shard_size` or `prune_sizes`. No size is made then.
    """
    folders = check_sizes(folder, configs)
    check_shard_size(max_shard_size)
    reports: dict[Path, PruneReport] = {}
    with ExitStack() as stack:
        places = [stack.enter_context(claimed(path)) for path in folders]
        sizes = prune_sizes(model, data, configs, processing_class)
        for path, place, report in zip(folders, places, sizes, strict=True):
            begin(SAVING)
            reports[path] = replace(report, command=command)
            save_to(place, model, processing_class, reports[path], {"max_shard_size": max_shard_size})
    if find_spec("matplotlib"):
        from .report.plots import plot_tradeoff

        plot_tradeoff({"pruned": list(reports.values())}).savefig(Path(folder) / PLOT_NAME)
    return reports


def check_sizes(folder: str | Path, configs: Sequence[PruneConfig]) -> list[Path]:
    """The folder of each size within `folder`, which may hold earlier sizes.

    Raises:
        ValueError: two sizes have one name, or `folder` or one in it holds something else.
        OSError: as `check_output`.
    """
    folder = Path(folder)
    folders = [folder / size_name(config) for config in configs]
    if len(set(folders)) < len(folders):
        raise ValueError(f"Two of the sizes are the same: {', '.join(path.name for path in folders)}.")
    if not any(folder.glob(f"*/{REPORT_NAME}")):
        if (folder / REPORT_NAME).is_file():
            raise ValueError(
                f"The output folder {folder} holds one pruned model: give another folder for several sizes."
            )
        check_output(folder)
    for path in folders:
        check_output(path)
    return folders


def size_name(config: PruneConfig) -> str:
    """Folder name of a config's size: `keep-0.5`, `keep-mlp-0.5-attention-0.75`, `params-20000000`, `size-500MB`."""
    name = config.target()
    value = getattr(config, name)
    if isinstance(value, dict):
        value = "-".join(f"{kind}-{fraction:g}" for kind, fraction in value.items())
    return f"{name}-{value}".replace(" ", "")


def size_table(reports: Sequence[PruneReport]) -> Table:
    """Size, cost and drift of every report side by side, as a rich table."""
    table = Table(title="Sizes", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("target", overflow="fold")
    qualities = list(reports[0].drift_figures)
    shown = [quality.replace("_", " ") for quality in qualities]
    for name in ("parameters", "MACs a sample", "latency", *shown):
        table.add_column(name, justify="right", min_width=max(map(len, name.split())))
    for report in reports:
        table.add_row(
            size_name(PruneConfig.from_dict(report.config)),
            f"{report.parameters.after / 1e6:.2f} M, {report.parameters.ratio:.0%}",
            f"{report.macs.after / 1e9:.3f} G, {report.macs.ratio:.0%}",
            "" if report.latency is None else f"{report.latency.after * 1e3:.1f} ms, {report.latency.ratio:.0%}",
            *(f"{report.drift[q]:.4f}" if q in report.drift else "" for q in qualities),
        )
    table.caption = f"{', '.join(shown)}: of the output on held-out samples."
    table.caption_justify = "left"
    return table
