"""The command `export`."""

from pathlib import Path
from typing import Annotated

import typer


def export(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Local folder or Hub id of a model, pruned or not.")],
    to: Annotated[str, typer.Option(help="gguf, for llama.cpp and what is built on it.")],
    out: Annotated[Path, typer.Option(help="What is written; it must not be there yet.")],
    like: Annotated[
        Path | None,
        typer.Option(help="With gguf: a GGUF file of the original model, whose tokenizer is taken over.", exists=True),
    ] = None,
) -> None:
    """Write a saved model in the form that another runtime reads."""
    from ..serving.export import export as write

    typer.echo(f"Exported to {write(folder, to, out, like=like)}.")
