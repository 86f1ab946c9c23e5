"""The command `export`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from ..runs.stages import EXPORTING, begin
from .options import RESULT, Json, Quiet
from .output import give, give_json, running


def export(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Local folder or Hub id of a model, pruned or not.")],
    to: Annotated[
        Literal["gguf", "vllm", "onnx"],
        typer.Option(help="gguf, a file for llama.cpp; vllm, a folder for vLLM; onnx, a file with one forward."),
    ],
    out: Annotated[
        Path, typer.Option(help="What is written; it must not be there yet.", metavar="NEW", rich_help_panel=RESULT)
    ],
    like: Annotated[
        Path | None,
        typer.Option(help="With gguf: a GGUF file of the original model, whose tokenizer is taken over.", exists=True),
    ] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Write a saved model in the form that another runtime reads."""
    with running((EXPORTING,), quiet):
        from ..serving.export import export as write

        begin(EXPORTING)
        written = write(folder, to, out, like=like)
    if as_json:
        give_json({"exported": str(written)})
    else:
        give(f"Exported to {written}.")
