"""The command `inspect`."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from ..runs.stages import FINDING, LOADING, advance, begin
from .options import Json, Quiet, loading_options
from .output import give, give_json, running

_SURVEYING = "Every architecture"


@loading_options
def inspect(
    loading: dict[str, Any],
    model: Annotated[str | None, typer.Argument(help="Local folder or Hub id of a model.", metavar="MODEL")] = None,
    every: Annotated[
        bool, typer.Option("--all", help="Survey a tiny model of every architecture in the installed Transformers.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="With --all: folder for coverage.json and coverage.md; a survey cut short goes on there."),
    ] = None,
    head: Annotated[
        list[str] | None, typer.Option(help="With --all: base or main, the models to build; both when left out.")
    ] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Show what can be pruned: blocks, their units and parameters; what is refused, and why."""
    if every == (model is not None):
        raise typer.BadParameter("Give a MODEL, or --all for every architecture.")
    if every:
        _survey(out, tuple(head or ("base", "main")), quiet)
        return
    with running((LOADING, FINDING), quiet):
        from ..data.datafiles import load_model
        from ..discovery.discover import discover
        from ..report.tables import found_table, refusal_table

        begin(LOADING)
        loaded, _ = load_model(str(model), **loading)
        begin(FINDING)
        found = discover(loaded)
    if as_json:
        give_json(_plain(loaded, found))
        return
    give(found_table(type(loaded).__name__, loaded.num_parameters(), found.blocks), refusal_table(found.refusals))


def _plain(model: Any, found: Any) -> dict[str, Any]:
    """What was found, as plain JSON types."""
    names = ("name", "kind", "consumer", "units", "parameters")
    return {
        "architecture": type(model).__name__,
        "parameters": model.num_parameters(),
        "blocks": [{name: getattr(block, name) for name in names} for block in found.blocks],
        "refusals": [asdict(refusal) for refusal in found.refusals],
    }


def _survey(out: Path | None, heads: Sequence[str], quiet: bool) -> None:
    with running((_SURVEYING,), quiet):
        from ..coverage.survey import Row, architectures_of, survey
        from ..coverage.table import append_row, stored_rows, summary, to_json, to_markdown

        unfinished = None if out is None else out / "coverage.unfinished.jsonl"
        done = [] if unfinished is None else stored_rows(unfinished)
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
        begin(_SURVEYING, len(heads) * len(architectures_of(None)) - len(done))

        def keep(row: Row) -> None:
            advance()
            if unfinished is not None:
                append_row(unfinished, row)

        rows = survey(heads=heads, done=done, progress=keep)
        if out is not None and unfinished is not None:
            (out / "coverage.json").write_text(to_json(rows), encoding="utf-8")
            (out / "coverage.md").write_text(to_markdown(rows), encoding="utf-8")
            unfinished.unlink(missing_ok=True)
    give(summary(rows))
