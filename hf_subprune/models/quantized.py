"""Models that a quantizer loaded: the marks that it left on them, and whether their weights are whole all the same."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

MARKS = ("is_quantized", "quantization_method", "hf_quantizer")
"""Attributes of a model by which Transformers knows that it is quantized; it refuses to cast, train or save it."""


def is_unpacked(model: PreTrainedModel, method: Any) -> bool:
    """Whether a quantizer of this name unpacked every weight of the model that it loaded.

    That of GGUF files does where it has no kernel for packed ones, and leaves its marks even so.
    """
    return method == "gguf" and all(parameter.is_floating_point() for parameter in model.parameters())


def remove_marks(model: PreTrainedModel) -> None:
    """Make a model of whole weights an ordinary one: it can be cast, trained and saved."""
    for name in MARKS:
        vars(model).pop(name, None)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            vars(module.config).pop("_is_quantized", None)
