"""Prune a vision transformer that reads handwritten digits: the same width in every layer, or each layer its own.

The digits are scikit-learn's, 8 x 8 pixels; a small ViT learns them in less than a minute.

    pip install 'hf_subprune[evaluate]'
    python recipes/vit_digits.py
"""

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from sklearn.datasets import load_digits
from tables import before_and_after, print_table
from transformers import PreTrainedModel, ViTConfig, ViTForImageClassification, set_seed
from transformers.utils import logging

from hf_subprune import PruneConfig
from hf_subprune.evaluation.tasks import Classification, Trial
from hf_subprune.pruning import prune_sizes

LAYOUTS = {"stock": "alike", "ragged": "each its own"}


def make_data() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Digits to train on and the last quarter, by other writers, to test on: pixels in [-1, 1], and labels."""
    digits = load_digits()
    pixels = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    data = {"pixel_values": pixels, "labels": torch.tensor(digits.target)}
    split = 3 * len(pixels) // 4
    return {name: x[:split] for name, x in data.items()}, {name: x[split:] for name, x in data.items()}


def make_model() -> ViTForImageClassification:
    """Four layers of four heads and 256 neurons, 16 patches of 2 x 2 pixels."""
    set_seed(0)
    return ViTForImageClassification(
        ViTConfig(
            image_size=8,
            patch_size=2,
            num_channels=1,
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_labels=10,
        )
    )


def train(model: PreTrainedModel, data: dict[str, torch.Tensor], epochs: int) -> None:
    """AdamW on batches of 64 images."""
    steps = epochs * -(-len(data["labels"]) // 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
    for _ in range(epochs):
        for index in torch.randperm(len(data["labels"])).split(64):
            model(**{name: x[index] for name, x in data.items()}).loss.backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Train, prune to every size and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.75, 0.5, 0.35], help="fractions to keep")
    parser.add_argument("--epochs", type=int, default=30, help="of training")
    parser.add_argument("--samples", type=int, default=512, help="images to calibrate on")
    options = parser.parse_args(arguments)
    logging.disable_progress_bar()
    training, test = make_data()
    model = make_model()
    train(model, training, options.epochs)

    rows_of = [{name: x[i] for name, x in test.items()} for i in range(len(test["labels"]))]
    trial = Trial(Classification(rows_of, dataset="digits", split="test"), model.eval())
    images = [{"pixel_values": training["pixel_values"]}]  # one ready batch, without labels
    common = {"samples": options.samples, "held_out": max(2, options.samples // 4)}
    configs = [PruneConfig(keep=keep, layout=layout, **common) for keep in options.keep for layout in LAYOUTS]
    rows = []
    for config, report in zip(configs, prune_sizes(model, images, configs), strict=True):
        row = {"keep": config.keep, "widths": LAYOUTS[config.layout], "MACs": report.macs.ratio}
        rows.append(row | before_and_after(trial, model))
    print_table("Handwritten digits, with 95% intervals of the paired bootstrap", rows)
    return rows


if __name__ == "__main__":
    main()
