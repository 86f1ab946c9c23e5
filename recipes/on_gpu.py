"""What pruning takes on a GPU: a model of Llama 2 7B's shape with random weights, and the solver by itself.

Ten minutes on one GPU of 80 GB. No figure of this package was measured on a GPU yet; what is printed bears its name.

    python recipes/on_gpu.py
    python recipes/on_gpu.py --shape tiny --device cpu
"""

import argparse
import platform
import time
from collections.abc import Sequence
from typing import Any

import torch
from llama_7b_offload import SHAPES
from tables import print_table
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hf_subprune import PruneConfig, prune
from hf_subprune.bench.scale import random_batches
from hf_subprune.bench.solver import bench_solver

RUNS: dict[str, dict[str, Any]] = {
    "default": {},
    "neurons, layer": {"units": ("mlp",), "variant": "layer"},
}
"""Fields of `PruneConfig` by the name of a row."""


def random_model(shape: str, device: torch.device) -> PreTrainedModel:
    """In bfloat16, made where it is to be: its weights would fill the memory of many a machine."""
    with device:
        return LlamaForCausalLM._from_config(LlamaConfig(**SHAPES[shape]), dtype=torch.bfloat16).eval()


def pruned(
    name: str, model: PreTrainedModel, settings: dict[str, Any], batches: list[dict[str, torch.Tensor]]
) -> dict[str, Any]:
    """Prune a model in one way; a row of the table."""
    device = model.device
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    report = prune(model, batches, PruneConfig(**settings, **RUNS[name]))
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else report.peak_memory
    stages = sorted(report.seconds.items(), key=lambda stage: -stage[1])
    return {
        "pruned": name,
        "of the original": report.parameters.ratio,
        "seconds": seconds,
        "longest stages": ", ".join(f"{stage} {took:.0f}" for stage, took in stages[:4]),
        "model, GB": size / 1e9,
        "peak memory, GB": peak / 1e9,
    }


def main(arguments: Sequence[str] | None = None) -> dict[str, list[dict[str, Any]]]:
    """Prune the model in each way, time the solver; the rows of both tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048, help="tokens a sample")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--keep", type=float, default=0.7)
    options = parser.parse_args(arguments)
    device: torch.device = options.device
    config = LlamaConfig(**SHAPES[options.shape])
    held_out = max(1, options.samples // 8)
    batches = random_batches(config, options.samples + held_out, options.length)
    settings = {
        "keep": options.keep,
        "samples": options.samples,
        "held_out": held_out,
        "batch_size": options.batch_size,
    }
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU"
    models = [pruned(name, random_model(options.shape, device), settings, batches) for name in RUNS]
    print_table(f"{options.samples} x {options.length} tokens, {where}", models)
    sizes = [(config.intermediate_size, config.hidden_size), (3 * config.hidden_size // 4, config.hidden_size // 4)]
    found = bench_solver(sizes, keep=options.keep, device=device, repeats=1)
    solved = [
        {
            "problem": row["problem"],
            "method": row["method"],
            "seconds": row["seconds"],
            "x Cholesky": row["ratio_to_cholesky"],
            "relative error": row["relative_error"],
        }
        for row in found
    ]
    print_table(f"Selecting {options.keep:.0%} of the columns, {where}", solved)
    return {"models": models, "solver": solved}


if __name__ == "__main__":
    main()
