"""Prune a mixture-of-experts language model: neurons inside its experts, whole experts, and one after the other.

A small Qwen3-MoE, eight experts a layer of which each token gets two, learns the docstrings of the standard library
for a minute or two; with `--model`, any mixture-of-experts language model of yours is pruned instead. Every way is
compared with the same removal without new weights.

    pip install 'hf_subprune[evaluate]'
    python recipes/moe.py
    python recipes/moe.py --model FOLDER_OR_HUB_ID --steps 0

With `--save FOLDER` the trained original is kept, with the docstrings as files that the command line reads:

    python recipes/moe.py --save experts
    hf-subprune bench quality experts --samples 256 --keep 0.25 \\
        --data experts/training.txt --test experts/test.txt
"""

import argparse
import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from causal_lm import LENGTH, load_or_train, perplexity_trial
from tables import before_and_after, print_table
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM, set_seed
from transformers.utils import logging

from hf_subprune import PruneConfig, prune
from hf_subprune.demo import docstrings

WAYS = {
    "neurons of all experts": {"units": ("mlp",), "keep": 0.25},
    "whole experts": {"units": ("experts",), "keep": 0.375},
    "experts, then neurons": {"units": ("experts", "mlp"), "keep": {"experts": 0.5, "mlp": 0.5}},
}


def make_model(vocabulary: int) -> Qwen3MoeForCausalLM:
    """Two layers of eight experts with 64 neurons each, at random."""
    set_seed(0)
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=vocabulary,
            hidden_size=128,
            moe_intermediate_size=64,
            num_experts=8,
            num_experts_per_tok=2,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=LENGTH,
            router_aux_loss_coef=0.01,
            output_router_logits=True,  # the loss then asks for experts that share the work
        )
    )


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Train if asked to, prune in every way and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub id; a small mixture of experts made here when left out")
    parser.add_argument("--steps", type=int, default=700, help="training steps of the original")
    parser.add_argument("--samples", type=int, default=256, help="paragraphs to calibrate on")
    parser.add_argument("--unseen", type=int, default=256, help="other paragraphs, to test on")
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="keep the original and the paragraphs there")
    options = parser.parse_args(arguments)
    logging.disable_progress_bar()
    unseen, texts = docstrings(options.unseen), docstrings(2800, offset=options.unseen)
    original, tokenizer = load_or_train(options.model, make_model, texts, options.steps)
    original.config.output_router_logits = False
    if options.save:
        original.save_pretrained(options.save)
        tokenizer.save_pretrained(options.save)
        for name, paragraphs in {"training": texts, "test": unseen}.items():
            (options.save / f"{name}.txt").write_text("\n".join(paragraphs), encoding="utf-8")
    trial = perplexity_trial(original, tokenizer, unseen)
    common = {"samples": options.samples, "held_out": max(2, options.samples // 4), "max_length": LENGTH}
    rows = []
    for name, way in WAYS.items():
        for reweight in (True, False):
            model = copy.deepcopy(original)
            report = prune(model, texts, PruneConfig(**common, **way, reweight=reweight), tokenizer)
            row = {"removed": name, "weights": "new" if reweight else "old", "layout": report.layout}
            row |= {"parameters": report.parameters.ratio, "MACs": report.macs.ratio}
            rows.append(row | before_and_after(trial, model))
    print_table("Perplexity of unseen docstrings, with 95% intervals of the paired bootstrap", rows)
    return rows


if __name__ == "__main__":
    main()
