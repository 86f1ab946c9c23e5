"""Exporting a saved model to the form of another runtime."""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path

from ..data.datafiles import load_model
from .gguf_file import write_gguf
from .nemotron import write_nemotron
from .onnx_file import write_onnx

TARGETS = ("gguf", "vllm", "onnx")
"""What `export` writes."""

_PACKAGES: dict[str, tuple[str, ...]] = {"gguf": ("gguf",), "vllm": (), "onnx": ("onnx", "onnxscript")}


def export(folder: str | Path, to: str, out: str | Path, *, like: str | Path | None = None) -> Path:
    """Write a saved model, pruned or not, in the form that another runtime reads.

    Args:
        folder: Local folder or Hub id of the model, of either layout.
        to: `"gguf"`: a file for llama.cpp and what is built on it. `"vllm"`: a folder for vLLM, of a ragged model.
            `"onnx"`: a file with one forward, without a cache, for any runtime of ONNX; weights beyond 2 GB go beside.
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
    for package in _PACKAGES[to]:
        if importlib.util.find_spec(package) is None:
            raise ImportError(f'Exporting to {to} takes the package {package}: pip install "hf_subprune[export]"')
    if like is not None and to != "gguf":
        raise ValueError(f"like belongs to 'gguf', not to {to!r}")
    model, _ = load_model(str(folder), device="cpu")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as partial:
        written = Path(partial) / out.name
        if to == "gguf":
            write_gguf(model, folder, written, like)
        elif to == "vllm":
            write_nemotron(model, folder, written)
        else:
            write_onnx(model, written)
        for path in Path(partial).iterdir():
            path.rename(out.parent / path.name)
    return out
