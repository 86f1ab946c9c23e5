"""The `hf-subprune` command: `inspect`, `prune`, `evaluate`, `report`, `push`, `export`, `demo` and `bench`."""

import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..bench.commands import bench_app
from ..config import PruneConfig
from .exporting import export
from .options import (
    Column,
    Columns,
    Commands,
    Data,
    DataFree,
    Dtype,
    Label,
    MetricName,
    Mixture,
    Model,
    Quiet,
    Split,
    TaskName,
    config_options,
)

app = typer.Typer(
    name="hf-subprune",
    cls=Commands,
    help="Structured pruning of pretrained Transformers from a few hundred unlabeled samples.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
# Of several processes, one speaks. Names and messages may hold brackets, which are no markup.
console = Console(quiet=int(os.environ.get("RANK", "0")) > 0, markup=False, emoji=False)

app.add_typer(bench_app, name="bench")
app.command()(export)


@app.command()
def inspect(
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
    dtype: Dtype = "auto",
) -> None:
    """Show what can be pruned: blocks, their units and parameters; what is refused, and why."""
    if every == (model is not None):
        raise typer.BadParameter("Give a MODEL, or --all for every architecture.")
    if every:
        _survey(out, tuple(head or ("base", "main")))
        return
    from ..blocks import Block
    from ..data.datafiles import load_model
    from ..discovery.discover import discover
    from ..report.tables import refusal_table

    loaded, _ = load_model(str(model), dtype=dtype)
    found = discover(loaded)
    table = Table(title=f"Prunable blocks of {type(loaded).__name__}", title_justify="left")
    for name in ("block", "kind", "units", "parameters"):
        table.add_column(name, justify="left" if name in ("block", "kind") else "right")
    rows: dict[str, list[Block]] = {}
    for block in found.blocks:
        rows.setdefault(block.stack or block.name, []).append(block)
    for group in rows.values():
        name, units = group[0].name, str(group[0].units)
        if group[0].queries is not None:
            units += f" (queries: {group[0].queries.units})"
        if group[0].stack is not None:
            name, units = f"{group[0].stack}.*", f"{len(group)} x {units}"
        table.add_row(name, group[0].kind, units, f"{sum(block.parameters for block in group):,}")
    inside = sum(block.parameters for block in found.blocks)
    table.caption = f"{inside:,} of {loaded.num_parameters():,} parameters ({inside / loaded.num_parameters():.0%})"
    table.caption_justify = "left"
    console.print(table)
    console.print(refusal_table(found.refusals))


def _survey(out: Path | None, heads: Sequence[str]) -> None:
    from transformers.utils import logging

    from ..coverage.survey import Row, architectures_of, survey
    from ..coverage.table import append_row, stored_rows, summary, to_json, to_markdown

    unfinished = None if out is None else out / "coverage.unfinished.jsonl"
    done = [] if unfinished is None else stored_rows(unfinished)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    with logging.tqdm(total=len(heads) * len(architectures_of(None)), desc="Architectures", disable=None) as bar:
        bar.update(len(done))

        def keep(row: Row) -> None:
            bar.update()
            if unfinished is not None:
                append_row(unfinished, row)

        rows = survey(heads=heads, done=done, progress=keep)
    if out is not None and unfinished is not None:
        (out / "coverage.json").write_text(to_json(rows), encoding="utf-8")
        (out / "coverage.md").write_text(to_markdown(rows), encoding="utf-8")
        unfinished.unlink(missing_ok=True)
    console.print(summary(rows))


@app.command()
@config_options
def prune(
    configs: list[PruneConfig],
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder to write the pruned model, its processor and the report to.")],
    data: Mixture = None,
    data_free: DataFree = False,
    split: Split = None,
    column: Column = None,
    dtype: Dtype = "auto",
    push: Annotated[str | None, typer.Option(help="Hub repo to push the result to, user/name.")] = None,
    offload: Annotated[
        bool, typer.Option("--offload", help="One layer in memory at a time; the same command goes on after a stop.")
    ] = False,
    max_shard_size: Annotated[
        str, typer.Option(help="Of one file of weights; with --offload, one is in memory when it is written.")
    ] = "2GB",
    quiet: Quiet = False,
) -> None:
    """Prune a model on unlabeled samples and save it; with several values of --keep, each size in a folder of OUT."""
    from ..checkpoint import prune_checkpoint
    from ..data.datafiles import load_mixture, load_model
    from ..pruning import prune as prune_model
    from ..report.hub import check_repo_name, push_folder
    from ..report.place import claimed
    from ..report.saving import check_output, check_shard_size, save_to
    from ..report.tables import block_table, summary_table
    from ..runs.processes import processes, state
    from ..sizes import check_sizes, save_sizes, size_table

    _set_quiet(quiet)
    check_shard_size(max_shard_size)
    if data_free == (data is not None):
        raise ValueError("Give --data DATA, or --data-free for text that the model makes up itself.")
    if data_free and (split or column or offload):
        raise ValueError("--data-free generates with the model in memory: leave --split, --column and --offload out.")
    if len(configs) > 1:
        if offload:
            raise ValueError("--offload takes one size: give one value of --keep.")
        if push is not None:
            raise ValueError("--push takes one size: push the folder of the one you want with `hf-subprune push`.")
        if processes() > 1:
            raise ValueError("Several processes prune to one size at a time: give one value of --keep.")
        check_sizes(out, configs)
        loaded, processing_class = load_model(model, dtype=dtype)
        if data:
            samples = load_mixture(data, split=split, column=column, seed=configs[0].seed)
        else:
            samples = _made_up(loaded, processing_class, configs)
        options: dict[str, Any] = {"max_shard_size": max_shard_size, "command": command_line()}
        reports = save_sizes(out, loaded, samples, configs, processing_class, **options)
        console.print(size_table(list(reports.values())))
        console.print("Saved to " + ", ".join(map(str, reports)) + ".", soft_wrap=True)
        return
    (config,) = configs
    if push is not None:
        check_repo_name(push)
    if offload:
        check_output(out)
        samples = load_mixture(data, split=split, column=column, seed=config.seed) if data else None
        options = {"dtype": dtype, "max_shard_size": max_shard_size, "command": command_line()}
        report = prune_checkpoint(model, samples, config, out, **options)
    else:
        with claimed(out) if state().is_main_process else nullcontext() as place:
            samples = load_mixture(data, split=split, column=column, seed=config.seed) if data else None
            loaded, processing_class = load_model(model, dtype=dtype)
            samples = samples or _made_up(loaded, processing_class, configs)
            report = replace(prune_model(loaded, samples, config, processing_class), command=command_line())
            if place is not None:
                save_to(place, loaded, processing_class, report, {"max_shard_size": max_shard_size})
    console.print(summary_table(report), block_table(report))
    console.print(f"Saved to {out}.", soft_wrap=True)
    if push is not None and state().is_main_process:
        console.print(f"Pushed: {push_folder(out, push).commit_url}", soft_wrap=True)


def _made_up(model: Any, tokenizer: Any, configs: Sequence[PruneConfig]) -> list[str]:
    """Text for configs that differ in size alone; of several processes, all read that of the first."""
    from ..data.generation import generated_text
    from ..runs.processes import from_process

    config = configs[0]
    options = {"max_length": config.max_length, "batch_size": config.batch_size, "seed": config.seed}
    return from_process(0, generated_text(model, tokenizer, config.samples + config.held_out, **options))


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a pruned model, or its report.")],
) -> None:
    """Show the report of an earlier run."""
    from ..report.report import PruneReport
    from ..report.tables import block_table, summary_table

    loaded = PruneReport.load(folder)
    console.print(summary_table(loaded), block_table(loaded))


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder that `prune` wrote.")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="Hub repo, user/name; made if need be.")],
    private: Annotated[bool | None, typer.Option(help="Whether a repo that is made is private.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch to commit to.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite a repo that is not one of ours.")] = False,
) -> None:
    """Push a pruned model with its card, report and plots to the Hub, as one commit."""
    from ..report.hub import PushOptions, push_folder

    options = PushOptions(private=private, revision=revision, create_pr=create_pr, force=force)
    commit = push_folder(folder, repo, options)
    console.print(f"Pushed: {commit.commit_url}", soft_wrap=True)


@app.command()
def evaluate(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Folder or Hub id of the pruned model.")],
    against: Annotated[str, typer.Option(help="Local folder or Hub id of the original model.")],
    data: Data,
    split: Split = None,
    column: Columns = None,
    task: TaskName = None,
    metric: MetricName = None,
    label: Label = None,
    samples: Annotated[
        int | None,
        typer.Option(help="Number of samples, drawn at random.", show_default="128; for a task, all of them", min=1),
    ] = None,
    max_length: Annotated[int, typer.Option(help="Tokens a sample is truncated to.", min=1)] = 256,
    batch_size: Annotated[int, typer.Option(help="Samples in a batch.", min=1)] = 16,
    dtype: Dtype = "auto",
    save: Annotated[
        bool, typer.Option("--save", help="Add the task's figures to the report in DIR, and so to its card.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Compare a pruned model with the original: size, latency, drift of the output, and a task.

    A task's figures come with 95% intervals of the paired bootstrap over samples.
    """
    from ..data.datafiles import load_data, load_model
    from ..evaluation.comparison import compare
    from ..evaluation.metrics import load_metric
    from ..evaluation.tasks import Trial, load_task
    from ..report.records import REPORT_NAME
    from ..report.report import PruneReport
    from ..report.tables import example_table, metric_table

    _set_quiet(quiet)
    if task is None and (metric or label or save):
        raise ValueError("--metric, --label and --save belong to a task: name it with --task.")
    if save and not Path(folder).is_dir():
        raise ValueError(f"--save adds to the report in DIR, a local folder that `prune` wrote; got {folder!r}.")
    report = PruneReport.load(folder) if save else None
    if report is not None and not os.access(Path(folder) / REPORT_NAME, os.W_OK):
        raise PermissionError(f"--save cannot write {Path(folder) / REPORT_NAME}: allow it, or leave --save out.")
    chosen = load_metric(metric) if metric else None
    original, processing_class = load_model(against, dtype=dtype)
    pruned, _ = load_model(folder, dtype=dtype)
    config = PruneConfig(samples=samples or 128, max_length=max_length, batch_size=batch_size)
    if task is None:
        unlabeled = load_data(data, split=split, column=column)
        console.print(compare(original, pruned, unlabeled, config, processing_class).table())
        return
    evaluated = load_task(
        task, data, processing_class, config, split=split, column=column, label=label, samples=samples
    )
    metrics = Trial(evaluated, original, chosen).score(pruned)
    console.print(compare(original, pruned, evaluated.inputs(), config, processing_class).table())
    console.print(*filter(None, (metric_table(metrics), example_table(metrics))))
    if report is not None:
        report.with_metrics(metrics).save(folder)
        console.print(f"Added to the report in {folder}.", soft_wrap=True)


@app.command()
def demo(
    out: Annotated[
        Path | None, typer.Option(help="Folder to save the pruned encoder to; a temporary one when left out.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Prune a real sentence encoder without a network: half of its MLP neurons, calibrated on 128 paragraphs."""
    from ..demo import run_demo
    from ..report.saving import check_output

    _set_quiet(quiet)
    if out is not None:
        check_output(out)
    console.print(run_demo(out))


def _set_quiet(quiet: bool) -> None:
    from transformers.utils import logging

    if quiet or not sys.stderr.isatty():
        logging.disable_progress_bar()


def command_line() -> str:
    """The command that is running, to be copied into a report."""
    return shlex.join(["hf-subprune", *sys.argv[1:]])


def main() -> None:
    """Entry point: what the user can mend is one line, without a traceback."""
    try:
        app()
    except (ValueError, TypeError, OSError, ImportError) as error:
        from ..report.plain import printable

        Console(stderr=True).print(Text.assemble(("Error:", "red"), " " + printable(str(error), keep="\n")))
        raise SystemExit(1) from error
