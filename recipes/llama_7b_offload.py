"""Prune a model that is larger than memory: a checkpoint of Llama 2 7B's shape, with random weights, layer by layer.

Makes the checkpoint (13.5 GB in bf16), prunes its MLPs and heads to 70% and runs the result once, each with one layer
in memory at a time. Stopped, and started again with the same options, it goes on behind the last finished layer.

    python recipes/llama_7b_offload.py --folder SOMEWHERE_WITH_60_GB
    python recipes/llama_7b_offload.py --shape tiny --folder /tmp/tiny
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tables import print_table
from transformers import LlamaConfig, LlamaForCausalLM

from hf_subprune import PruneConfig, prune_checkpoint
from hf_subprune.bench.scale import random_batches, random_checkpoint

SHAPES = {
    "7b": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
    },
    "tiny": {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "max_position_embeddings": 512,
    },
}
# Where the layers of a Llama are, and all else.
PLACES = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu"}


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Make, prune and run the checkpoint; figures by name."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--folder", type=Path, required=True, help="for the checkpoint and the pruned one")
    parser.add_argument("--layers", type=int, help="fewer of them, to see the peak of memory sooner")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=512, help="tokens a sample")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--keep", type=float, default=0.7)
    options = parser.parse_args(arguments)
    shape = SHAPES[options.shape]
    config = LlamaConfig(**shape | {"num_hidden_layers": options.layers or shape["num_hidden_layers"]})
    source, out = options.folder / "model", options.folder / "pruned"
    if not (source / "model.safetensors.index.json").exists():  # written last
        random_checkpoint(source, config)
    held_out = max(1, options.samples // 4)
    report = prune_checkpoint(
        source,
        random_batches(config, options.samples + held_out, options.length),
        PruneConfig(
            keep=options.keep,
            samples=options.samples,
            held_out=held_out,
            batch_size=options.batch_size,
            variant="layer",  # random weights have neither errors worth mending
            loss_aware=False,  # nor sensitivities worth a backward
            budget="uniform",  # nor losses worth comparing
        ),
        out,
    )
    model = LlamaForCausalLM.from_pretrained(
        out, device_map={**PLACES, "lm_head": "cpu"}, offload_folder=options.folder / "offloaded"
    )
    with torch.no_grad():
        logits = model(**random_batches(config, 1, 16)[0]).logits
    row = {
        "parameters": report.parameters.after / 1e9,
        "of the original": report.parameters.ratio,
        "layout": report.layout,
        "minutes": sum(report.seconds.values()) / 60,
        "peak memory, GB": report.peak_memory / 1e9,
        "finite logits": bool(logits.isfinite().all()),
    }
    print_table("Pruned layer by layer", [row])
    return row


if __name__ == "__main__":
    main()
