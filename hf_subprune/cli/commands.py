"""The `hf-subprune` command: its commands, of which the short ones stand here."""

import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from ..bench.commands import bench_app
from ..runs.stages import DEMO, PUSHING, begin
from .evaluating import evaluate
from .exporting import export
from .help import Commands
from .inspecting import inspect
from .options import RESULT, Json, Overwrite, Quiet
from .output import give, give_json, reported, running, silence_libraries
from .pruning import prune, refuse_earlier

app = typer.Typer(
    name="hf-subprune",
    cls=Commands,
    help="Structured pruning of pretrained Transformers from a few hundred unlabeled samples.\n\n"
    "Example: hf-subprune prune MODEL --data texts.txt --out smaller --keep 0.5",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command()(inspect)
app.command()(prune)
app.command()(evaluate)
app.command()(export)


def _show_version(asked: bool) -> None:
    if asked:
        from .. import __version__

        typer.echo(f"hf-subprune {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    """Nothing is common to all commands but what ends before they begin."""


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a pruned model, or its report.")],
    opened: Annotated[
        bool, typer.Option("--open", help="Open its page in a browser.", rich_help_panel=RESULT)
    ] = False,
    as_json: Json = False,
) -> None:
    """Show the report of an earlier run."""
    with running((), quiet=True):
        from ..report.html import page_of
        from ..report.report import PruneReport
        from ..report.tables import block_table, summary_table

        loaded = PruneReport.load(folder)
    if opened:
        webbrowser.open(page_of(folder).as_uri())
    if as_json:
        give_json(loaded.to_dict())
    else:
        give(summary_table(loaded), block_table(loaded))


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder that `prune` wrote.")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="Hub repo, user/name; made if need be.")],
    private: Annotated[bool | None, typer.Option(help="Whether a repo that is made is private.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch to commit to.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite a repo that is not one of ours.")] = False,
    token: Annotated[
        str | None,
        typer.Option(help="For the Hub; the one that `hf auth login` or HF_TOKEN stores when left out."),
    ] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Push a pruned model with its card, report and plots to the Hub, as one commit."""
    with running((PUSHING,), quiet):
        from ..report.hub import PushOptions, push_folder

        begin(PUSHING)
        options = PushOptions(private=private, revision=revision, create_pr=create_pr, force=force, token=token)
        commit = push_folder(folder, repo, options)
    if as_json:
        give_json({"pushed": str(commit.commit_url)})
    else:
        give(f"Pushed: {commit.commit_url}")


@app.command()
def demo(
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder to save the pruned encoder to; a temporary one when left out.",
            metavar="DIR",
            rich_help_panel=RESULT,
        ),
    ] = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Prune a real sentence encoder without a network: half of its MLP neurons, calibrated on 128 paragraphs."""
    with running(DEMO, quiet):
        from ..demo import run_demo
        from ..report.saving import check_output

        if out is not None:
            if not overwrite:
                refuse_earlier(out)
            check_output(out)
        result = run_demo(out)
    give(result)


app.add_typer(bench_app, name="bench")


def main() -> None:
    """Entry point: what the user can mend is one line, without a traceback."""
    silence_libraries()
    reported(app)
