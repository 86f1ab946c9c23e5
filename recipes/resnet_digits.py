"""Prune the channels of a ResNet that reads handwritten digits: three ways to weigh those that are left.

The paper's own case: the consumer of a channel is the next convolution, its moments are those of the patches that it
reads, and norms and depthwise convolutions between shrink with the channels. The digits are scikit-learn's; the ResNet
learns them in less than two minutes.

    pip install 'hf_subprune[evaluate]'
    python recipes/resnet_digits.py

With `--save FOLDER` the trained ResNet is kept, with the digits as files that the command line reads:

    python recipes/resnet_digits.py --save digits
    hf-subprune bench quality digits --kind channels --samples 512 \\
        --data digits/training.parquet --test digits/test.parquet --task classification
"""

import argparse
import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, disable_progress_bars
from tables import before_and_after, print_table
from torch.nn.functional import interpolate
from transformers import ResNetConfig, ResNetForImageClassification, set_seed
from transformers.utils import logging
from vit_digits import make_data, train

from hf_subprune import PruneConfig, prune
from hf_subprune.evaluation.tasks import Classification, Trial

WAYS = {
    "new weights, residual stream mended": {"variant": "residual"},
    "new weights, earlier errors mended": {"variant": "asym"},
    "new weights, layer by layer": {"variant": "layer"},
    "old weights": {"reweight": False},
}


def make_model() -> ResNetForImageClassification:
    """Three stages of two bottleneck layers for images of 32 x 32 pixels, at random."""
    set_seed(0)
    return ResNetForImageClassification(
        ResNetConfig(num_channels=1, embedding_size=32, hidden_sizes=[64, 128, 256], depths=[2, 2, 2], num_labels=10)
    )


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Train, prune in every way and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=float, default=0.5, help="fraction of the channels' parameters to keep")
    parser.add_argument("--epochs", type=int, default=15, help="of training")
    parser.add_argument("--samples", type=int, default=512, help="images to calibrate on")
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="keep the trained ResNet and its data there")
    options = parser.parse_args(arguments)
    logging.disable_progress_bar()
    disable_progress_bars()
    training, test = make_data()
    for data in (training, test):
        data["pixel_values"] = interpolate(data["pixel_values"], 32)
    original = make_model()
    train(original, training, options.epochs)
    if options.save:
        original.save_pretrained(options.save)
        for name, data in {"training": training, "test": test}.items():
            columns = {column: values.numpy() for column, values in data.items()}
            Dataset.from_dict(columns).to_parquet(options.save / f"{name}.parquet")

    rows_of = [{name: x[i] for name, x in test.items()} for i in range(len(test["labels"]))]
    trial = Trial(Classification(rows_of, dataset="digits", split="test"), original.eval())
    images = [{"pixel_values": training["pixel_values"]}]  # one ready batch, without labels
    common = {
        "units": ("channels",),
        "keep": options.keep,
        "budget": "uniform",  # the same widths for all
        "samples": options.samples,
        "held_out": max(2, options.samples // 4),
    }
    rows = []
    for name, way in WAYS.items():
        model = copy.deepcopy(original)
        report = prune(model, images, PruneConfig(**common, **way))
        row = {"pruned": name, "parameters": report.parameters.ratio, "MACs": report.macs.ratio}
        rows.append(row | before_and_after(trial, model))
    print_table("Handwritten digits, with 95% intervals of the paired bootstrap", rows)
    return rows


if __name__ == "__main__":
    main()
