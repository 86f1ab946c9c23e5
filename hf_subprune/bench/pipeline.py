"""How long each stage of `prune` takes, against the calibration forwards alone, and its memory."""

import multiprocessing
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import psutil
import torch
from rich.table import Table
from transformers import PreTrainedModel

from ..config import VARIANTS, PruneConfig
from ..data.datafiles import load_data, load_model
from ..data.reading import read
from ..models.running import call
from ..pruning import prune

Loader = Callable[[], tuple[PreTrainedModel, Any, Any]]
"""Loads a model, its processing class, and data for it."""

RUNS: Mapping[str, Mapping[str, Any]] = {
    "default": {},
    **{f"neurons, {variant}": {"units": ("mlp",), "variant": variant} for variant in VARIANTS},
}
"""Fields of `PruneConfig` by the name of a run."""


def bench_pipeline(
    load: Loader | None = None, config: PruneConfig | None = None, runs: Sequence[str] = tuple(RUNS)
) -> list[dict[str, Any]]:
    """One row per run, each measured in a process of its own.

    Args:
        load: The model and the data; the demo encoder and paragraphs of docstrings when left out.
        config: Of all runs, but for what `RUNS` says of each.
        runs: Names in `RUNS`.

    Returns:
        Rows of `run`, `forward` (CPU seconds of the base model's forwards over the samples fitted on), `total` (CPU
        seconds of `prune`), `ratio` (`total / forward`), `stages` (CPU seconds each, by their shares of the wall
        time), `memory` (largest resident size during `prune` beyond the one before it, bytes), `model` (bytes of the
        model's parameters).
    """
    context = multiprocessing.get_context("spawn")  # a fresh process: its peak is this run's alone
    rows = []
    for run in runs:
        own = replace(config or PruneConfig(samples=128, held_out=32), **RUNS[run])
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            rows.append(pool.submit(_row, run, load or demo, own).result())
    return rows


def demo() -> tuple[PreTrainedModel, Any, Any]:
    """The demo encoder, and text in plenty."""
    from transformers import AutoModel, AutoTokenizer

    from ..demo import demo_model_folder, docstrings

    folder = demo_model_folder()
    return AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder), docstrings(1000)


def loaded(folder: str, data: str) -> Loader:
    """A model of one's own in float32, and its data: both as for `prune`."""
    return partial(_loaded, folder, data)


def _loaded(folder: str, data: str) -> tuple[PreTrainedModel, Any, Any]:
    return *load_model(folder, torch.float32), list(load_data(data))


def table(rows: list[dict[str, Any]]) -> Table:
    """A column for each of the rows, as a rich table."""
    shown = Table(title="Forwards over the samples a stage", title_justify="left")
    shown.add_column("")
    for row in rows:
        shown.add_column(row["run"], justify="right")
    shown.add_row("seconds of one", *(f"{row['forward']:.2f}" for row in rows), end_section=True)
    for stage in dict.fromkeys(stage for row in rows for stage in row["stages"]):
        shown.add_row(stage, *(f"{row['stages'].get(stage, 0.0) / row['forward']:.2f}" for row in rows))
    shown.add_section()
    shown.add_row("in all", *(f"{row['ratio']:.2f}" for row in rows))
    shown.add_row("CPU seconds", *(f"{row['total']:.1f}" for row in rows))
    shown.add_row("memory", *(f"{row['memory'] / 2**20:.0f} MiB" for row in rows))
    shown.caption = (
        f"A forward is that of the model without its head, in CPU seconds, {rows[0]['threads']} threads. Memory: "
        f"beyond the model ({rows[0]['model'] / 2**20:.0f} MiB) and the data."
    )
    shown.caption_justify = "left"
    return shown


def _row(run: str, load: Loader, config: PruneConfig) -> dict[str, Any]:
    model, processing_class, data = load()
    batches = read(model, data, config, processing_class).fit
    call(model.base_model, batches[0])
    start = time.process_time()
    for batch in batches:
        call(model.base_model, batch)
    forward = time.process_time() - start
    before = psutil.Process().memory_info().rss
    wall, start = time.perf_counter(), time.process_time()
    report = prune(model, data, config, processing_class)
    total, wall = time.process_time() - start, time.perf_counter() - wall
    return {
        "run": run,
        "samples": config.samples,
        "threads": torch.get_num_threads(),
        "forward": forward,
        "total": total,
        "ratio": total / forward,
        "stages": {stage: seconds * total / wall for stage, seconds in report.seconds.items()},
        "memory": max(0, report.peak_memory - before),
        "model": sum(p.numel() * p.element_size() for p in model.parameters()),
    }
