"""Exporting a saved model to the form of another runtime."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from ..data.datafiles import load_model
from .gguf_file import write_gguf

TARGETS = ("gguf",)
"""What `export` writes."""


def export(folder: str | Path, to: str, out: str | Path, *, like: str | Path | None = None) -> Path:
    """Write a saved model, pruned or not, in the form that another runtime reads.

    Args:
        folder: Local folder or Hub id of the model, of either layout.
        to: `"gguf"`: a file for llama.cpp and what is built on it.
        out: What is written; it must not be there yet.
        like: For `"gguf"`: a GGUF file of the original model, whose tokenizer and chat template are taken over.

    Returns:
        `out`.

    Raises:
        ValueError: the runtime has no form for this model; the message says why, and nothing is written.
        FileExistsError: there is something at `out`.
        ImportError: a package that `pip install "hf_subprune[export]"` brings is missing.
    """
    if to not in TARGETS:
        raise ValueError(f"to must be {' or '.join(map(repr, TARGETS))}, got {to!r}")
    out = Path(out)
    if out.exists():
        raise FileExistsError(f"{out} is there already: give another place, or remove it")
    if importlib.util.find_spec("gguf") is None:
        raise ImportError('Exporting to GGUF takes the package gguf: pip install "hf_subprune[export]"')
    model, _ = load_model(str(folder), device="cpu")
    partial = out.with_name(f".{out.name}.partial")
    try:
        write_gguf(model, folder, partial, like)
        partial.rename(out)
    finally:
        partial.unlink(missing_ok=True)
    return out
