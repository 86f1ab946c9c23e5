"""A model as an ONNX file, written by torch's exporter: one forward without a cache, for batches of any size."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..discovery.probe_inputs import probe_inputs


def write_onnx(model: PreTrainedModel, out: str | Path) -> None:
    """Write one forward of a model; its inputs have the names that the forward has for them.

    Texts can be of any length, where the model allows it; images and sounds have the size that the model was made for.

    Args:
        model: On the CPU. Weights keep their dtype.
        out: The file; weights beyond 2 GB go into one beside it.

    Raises:
        ValueError: torch cannot export this model; the message is torch's.
    """
    inputs = {name: value for name, value in probe_inputs(model).items() if isinstance(value, torch.Tensor)}
    options = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    with torch.no_grad():
        names = [name for name, value in model(**inputs, **options).items() if isinstance(value, torch.Tensor)]
    try:
        torch.onnx.export(
            model,
            kwargs={**inputs, **options},
            f=out,
            input_names=list(inputs),
            output_names=names,
            dynamic_shapes={name: _sizes(value) for name, value in inputs.items()} | dict.fromkeys(options),
            dynamo=True,
            verbose=False,
        )
    except Exception as error:  # the exporter raises errors of every type
        raise ValueError(f"{type(model).__name__} cannot be exported to ONNX: {error}") from error


def _sizes(value: torch.Tensor) -> dict[int, Any]:
    """Dimensions that may have other sizes: the batch, and the length of texts."""
    free = (0,) if value.is_floating_point() else range(value.dim())
    return dict.fromkeys(free, torch.export.Dim.DYNAMIC)
