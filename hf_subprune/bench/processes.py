"""The calibration stage of one model in one process and in several, one thread each."""

import time
import uuid
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import patch_environment
from rich.table import Table
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from ..collection.planning import plan
from ..collection.walk import Walk
from ..config import PruneConfig
from ..data.reading import read
from ..discovery.discover import discover
from ..runs.processes import processes, state
from .scale import LENGTH, random_batches, small_llama

PROCESSES = (1, 2)


def bench_processes(
    counts: Sequence[int] = PROCESSES, layers: int = 4, samples: int = 512, width: int = 256
) -> list[dict[str, Any]]:
    """One row for each number of processes on the CPU, which share the batches; each has one thread.

    Args:
        counts: Numbers of processes; the first is what the others are compared with.
        layers: Of a random Llama.
        samples: To fit on, of 128 tokens each; a quarter as many are held out.
        width: Hidden size; MLPs are four times as wide.

    Returns:
        Rows of `processes`, `seconds` of the calibration stage (forwards, moments, and their sum over the processes),
        `speedup` over the first row, and `cpu_seconds` and `cpu_speedup` of the process that computes longest, which
        say what there would be to gain where other programs leave the cores alone.
    """
    config = small_llama(layers, width)
    rows: list[dict[str, Any]] = []
    for count in counts:
        launch = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=count,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            start_method="spawn",
            max_restarts=0,
        )
        with patch_environment(ACCELERATE_USE_CPU="1", OMP_NUM_THREADS="1"):
            taken = elastic_launch(launch, _calibration)(config, samples).values()
        seconds, cpu_seconds = (max(times) for times in zip(*taken, strict=True))
        first = rows[0] if rows else {"seconds": seconds, "cpu_seconds": cpu_seconds}
        rows.append(
            {
                "processes": count,
                "seconds": seconds,
                "speedup": first["seconds"] / seconds,
                "cpu_seconds": cpu_seconds,
                "cpu_speedup": first["cpu_seconds"] / cpu_seconds,
            }
        )
    return rows


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """The rows as a rich table."""
    shown = Table(title="Calibration stage, one thread a process", title_justify="left")
    for name in ("processes", "seconds", "x faster", "CPU seconds", "x fewer"):
        shown.add_column(name, justify="right")
    figures = ("seconds", "speedup", "cpu_seconds", "cpu_speedup")
    for row in rows:
        shown.add_row(str(row["processes"]), *(f"{row[name]:.2f}" for name in figures))
    shown.caption = "CPU seconds are those of one process, the longest."
    shown.caption_justify = "left"
    return shown


def _calibration(config: LlamaConfig, count: int) -> tuple[float, float]:
    """Wall and CPU seconds of the stage in one of the processes."""
    torch.set_num_threads(1)
    set_seed(0)
    model = LlamaForCausalLM(config).eval()
    held_out = max(1, count // 4)
    wanted = PruneConfig(samples=count, held_out=held_out, batch_size=4)
    samples = read(model, random_batches(config, count + held_out, LENGTH), wanted)
    blocks = discover(model, samples.probe).blocks
    segments = plan(samples, blocks)
    owners = {block.name: turn % processes() for turn, block in enumerate(blocks)}
    state().wait_for_everyone()
    wall, cpu = time.perf_counter(), time.process_time()
    walk = Walk(samples, segments, owners)
    for segment in walk.left:
        walk.start(segment)
        walk.moments(segment.blocks)
    taken = time.perf_counter() - wall, time.process_time() - cpu
    state().destroy_process_group()
    return taken
