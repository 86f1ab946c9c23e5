"""Memory that `prune_checkpoint` takes as a model gets deeper and samples more, each measured in its own process."""

import json
import multiprocessing
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.table import Table
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from ..checkpoint import prune_checkpoint
from ..config import PruneConfig
from ..storage.skeleton import build_skeleton

LAYERS = (8, 16, 32)
SAMPLES = (8, 16, 32)
LENGTH = 128


def random_checkpoint(folder: Path, config: LlamaConfig, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> int:
    """Write a checkpoint of random weights, a file and a layer at a time, so that it may be larger than memory.

    Args:
        folder: Made if missing.
        config: Of the model.
        dtype: Of the weights.
        seed: Of the weights.

    Returns:
        Bytes of the weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(**{**config.to_dict(), "dtype": dtype, "architectures": ["LlamaForCausalLM"]})
    config.save_pretrained(folder)
    files: dict[str, list[tuple[str, torch.Size]]] = {}
    for name, tensor in build_skeleton(LlamaForCausalLM, config).state_dict().items():
        layer = name.partition("layers.")[2].partition(".")[0] or "rest"
        files.setdefault(f"model-{layer}.safetensors", []).append((name, tensor.shape))
    generator = torch.Generator().manual_seed(seed)
    total = 0
    for file, entries in files.items():
        tensors = {name: _random(shape, dtype, generator) for name, shape in entries}
        total += sum(tensor.nbytes for tensor in tensors.values())
        save_file(tensors, folder / file, metadata={"format": "pt"})
    index = {
        "metadata": {"total_size": total},
        "weight_map": {name: file for file, entries in files.items() for name, _ in entries},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return total


def _random(shape: torch.Size, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=dtype)
    return torch.empty(shape, dtype=dtype).normal_(0, shape[-1] ** -0.5, generator=generator)


def small_llama(layers: int, width: int) -> LlamaConfig:
    """A Llama of some depth and hidden size; MLPs are four times as wide, and the vocabulary is small."""
    return LlamaConfig(
        vocab_size=512,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=LENGTH,
    )


def random_batches(config: LlamaConfig, samples: int, length: int, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Token ids at random in one batch, which is cut into batches of the size that a config asks for."""
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(3, config.vocab_size, (samples, length), generator=generator)}]


def bench_scale(
    layers: Sequence[int] = LAYERS,
    samples: Sequence[int] = SAMPLES,
    width: int = 512,
    advanced: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """One row for each depth at the fewest samples, and for each number of samples at the least depth.

    Args:
        layers: Numbers of layers.
        samples: Numbers of samples to fit on; a quarter as many are held out.
        width: Hidden size; MLPs are four times as wide.
        advanced: Called after each row.

    Returns:
        Rows of `layers`, `samples`, `checkpoint` (bytes of the weights), `states` (bytes of the hidden states of all
        samples), `memory` (largest resident size beyond that of the process before, bytes) and `seconds`.
    """
    cases = dict.fromkeys([*((depth, min(samples)) for depth in layers), *((min(layers), count) for count in samples)])
    context = multiprocessing.get_context("spawn")  # a fresh process: its peak is this run's alone
    rows = []
    for depth, count in cases:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            rows.append(pool.submit(_row, depth, count, width).result())
        advanced()
    return rows


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """The rows as a rich table."""
    shown = Table(title="Memory of prune_checkpoint", title_justify="left")
    for name in ("layers", "samples", "checkpoint", "hidden states", "memory", "seconds"):
        shown.add_column(name, justify="right")
    for row in rows:
        sizes = (f"{row[name] / 2**20:.0f} MiB" for name in ("checkpoint", "states", "memory"))
        shown.add_row(str(row["layers"]), str(row["samples"]), *sizes, f"{row['seconds']:.0f}")
    shown.caption = (
        "Memory: largest resident size (anonymous pages and those of mapped files), beyond that of Python and its "
        "libraries. Hidden states lie on disk."
    )
    shown.caption_justify = "left"
    return shown


def _row(layers: int, samples: int, width: int) -> dict[str, Any]:
    config = small_llama(layers, width)
    held_out = max(1, samples // 4)
    batches = random_batches(config, samples + held_out, LENGTH)
    wanted = PruneConfig(samples=samples, held_out=held_out, batch_size=2, keep=0.7)
    with tempfile.TemporaryDirectory() as folder:
        size = random_checkpoint(Path(folder) / "model", config, torch.float32)
        before = psutil.Process().memory_info().rss
        # A shard is in memory when it is written: one holds no more than a layer, as those of large models do.
        report = prune_checkpoint(
            Path(folder) / "model", batches, wanted, Path(folder) / "pruned", max_shard_size=size // layers
        )
    return {
        "layers": layers,
        "samples": samples,
        "checkpoint": size,
        "states": (samples + held_out) * LENGTH * width * 4,
        "memory": max(0, report.peak_memory - before),
        "seconds": sum(report.seconds.values()),
    }
