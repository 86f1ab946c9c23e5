"""How long each stage of `prune` takes on the demo model, against the calibration forwards alone, and its memory."""

import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import psutil
import torch
from rich.table import Table
from transformers import AutoModel, AutoTokenizer

from ..config import VARIANTS, PruneConfig
from ..data.reading import read
from ..demo import demo_model_folder, docstrings
from ..models.running import call
from ..pruning import prune


def bench_pipeline(samples: int = 128, variants: tuple[str, ...] = VARIANTS) -> list[dict[str, Any]]:
    """One row per variant, each measured in a process of its own.

    Args:
        samples: Paragraphs to calibrate on; 32 more are held out.
        variants: Of `PruneConfig.variant`.

    Returns:
        Rows of `variant`, `forward` (seconds of a forward over the samples fitted on), `total` (seconds of `prune`),
        `ratio` (`total / forward`), `stages` (seconds each), `memory` (largest resident size during `prune` beyond the
        one before it, bytes), `model` (bytes of the model's parameters).
    """
    context = multiprocessing.get_context("spawn")  # a fresh process: its peak is this run's alone
    rows = []
    for variant in variants:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            rows.append(pool.submit(_row, samples, variant).result())
    return rows


def table(rows: list[dict[str, Any]]) -> Table:
    """A column for each of the rows, as a rich table."""
    shown = Table(title="all-MiniLM-L6-v2, seconds a stage", title_justify="left")
    shown.add_column("")
    for row in rows:
        shown.add_column(row["variant"], justify="right")
    shown.add_row("forward", *(f"{row['forward']:.2f}" for row in rows), end_section=True)
    for stage in rows[0]["stages"]:
        shown.add_row(stage, *(f"{row['stages'][stage]:.2f}" for row in rows))
    shown.add_section()
    shown.add_row("total", *(f"{row['total']:.2f}" for row in rows))
    shown.add_row("total / forward", *(f"{row['ratio']:.1f}" for row in rows))
    shown.add_row("memory", *(f"{row['memory'] / 2**20:.0f} MiB" for row in rows))
    shown.caption = f"Memory: beyond the model and the data. The model: {rows[0]['model'] / 2**20:.0f} MiB."
    shown.caption_justify = "left"
    return shown


def _row(samples: int, variant: str) -> dict[str, Any]:
    folder = demo_model_folder()
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    texts = docstrings(samples + 32)
    config = PruneConfig(samples=samples, held_out=32, variant=variant)
    batches = read(model, texts, config, tokenizer).fit
    call(model, batches[0])
    start = time.perf_counter()
    for batch in batches:
        call(model, batch)
    forward = time.perf_counter() - start
    before = psutil.Process().memory_info().rss
    start = time.perf_counter()
    report = prune(model, texts, config, tokenizer)
    total = time.perf_counter() - start
    return {
        "variant": variant,
        "samples": samples,
        "threads": torch.get_num_threads(),
        "forward": forward,
        "total": total,
        "ratio": total / forward,
        "stages": report.seconds,
        "memory": max(0, report.peak_memory - before),
        "model": sum(p.numel() * p.element_size() for p in model.parameters()),
    }
