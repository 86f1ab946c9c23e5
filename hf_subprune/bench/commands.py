"""The `hf-subprune bench` commands: each prints a table and saves its rows as JSON."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

bench_app = typer.Typer(help="Measure this package on this machine.", no_args_is_help=True)
console = Console(markup=False, emoji=False)

Out = Annotated[Path | None, typer.Option(help="Folder for the rows as JSON, and for plots.")]


@bench_app.command()
def pipeline(
    model: Annotated[str | None, typer.Option(help="Folder or Hub id; the demo encoder when left out.")] = None,
    data: Annotated[str | None, typer.Option(help="With --model: as for `prune`.")] = None,
    samples: Annotated[int, typer.Option(help="Samples to calibrate on.", min=4)] = 128,
    held_out: Annotated[int | None, typer.Option(help="Further ones; a quarter as many when left out.", min=1)] = None,
    length: Annotated[int, typer.Option(help="Tokens of a sample, at most.", min=1)] = 512,
    keep: Annotated[float, typer.Option(help="Fraction of the blocks' parameters kept.")] = 0.5,
    run: Annotated[list[str] | None, typer.Option(help="Default, or neurons and a variant; may be repeated.")] = None,
    out: Out = None,
) -> None:
    """What each stage of pruning takes, in forwards over the samples, and peak memory, per variant.

    What other methods take on a language model: recipes/smollm2.py runs FLAP, OSSCAR and others beside it.
    """
    from ..config import PruneConfig
    from .pipeline import RUNS, bench_pipeline, loaded, table

    if (model is None) != (data is None):
        raise typer.BadParameter("--model and --data come together.")
    if unknown := set(run or ()) - RUNS.keys():
        raise typer.BadParameter(f"Unknown run {unknown.pop()!r}: choose from {', '.join(map(repr, RUNS))}.")
    load = None if model is None or data is None else loaded(model, data)
    held_out = held_out or max(1, samples // 4)
    config = PruneConfig(samples=samples, held_out=held_out, max_length=length, keep=keep)
    rows = bench_pipeline(load, config, run or tuple(RUNS))
    _save(rows, out, "pipeline.json")
    console.print(table(rows))


@bench_app.command()
def quality(
    model: Annotated[str | None, typer.Argument(help="Folder or Hub id; the demo model when left out.")] = None,
    data: Annotated[str | None, typer.Option(help="As for `prune`; docstrings when left out.")] = None,
    test: Annotated[str | None, typer.Option(help="Unseen data to score each model on.")] = None,
    task: Annotated[str, typer.Option(help="With --test: as for `evaluate`.")] = "perplexity",
    metric: Annotated[str | None, typer.Option(help="With --test: as for `evaluate`.")] = None,
    label: Annotated[str | None, typer.Option(help="With --test: column of labels.")] = None,
    keep: Annotated[list[float] | None, typer.Option(help="Kept fraction; may be repeated.")] = None,
    importance: Annotated[list[str] | None, typer.Option(help="Importance; may be repeated.")] = None,
    variant: Annotated[list[str] | None, typer.Option(help="Variant; may be repeated.")] = None,
    kind: Annotated[str, typer.Option(help="Kind of units to prune.")] = "mlp",
    samples: Annotated[int, typer.Option(help="Samples to calibrate on.", min=4)] = 128,
    max_length: Annotated[int, typer.Option(help="Tokens a sample is truncated to.", min=1)] = 256,
    split: Annotated[str | None, typer.Option(help="Split of the data set.")] = None,
    column: Annotated[str | None, typer.Option(help="Column to read.")] = None,
    out: Out = None,
) -> None:
    """Every importance, with and without new weights, and every variant: block error, drift, a task, seconds."""
    from transformers.utils import logging

    from ..config import IMPORTANCES, VARIANTS, PruneConfig
    from ..data.datafiles import load_data, load_model
    from ..demo import demo_model_folder, docstrings
    from ..evaluation.metrics import load_metric
    from ..evaluation.tasks import Trial, load_task
    from .quality import bench_quality, plot, settings, table

    loaded, processing_class = load_model(str(demo_model_folder()) if model is None else model)
    base = PruneConfig(units=(kind,), samples=samples, max_length=max_length)
    texts: Any = docstrings(samples + base.held_out)
    if data is not None:
        texts = list(load_data(data, split=split, column=column).take(samples + base.held_out))
        texts = [next(iter(row.values())) if len(row) == 1 else row for row in texts]
    trial = None
    if test is not None:
        held = load_task(task, test, processing_class, base, column=column, label=label)
        trial = Trial(held, loaded, load_metric(metric) if metric else None)
    configs = list(settings(keep or [0.5], importance or IMPORTANCES, variant or VARIANTS, base))
    with logging.tqdm(total=len(configs), desc="Settings", disable=None) as bar:
        rows = bench_quality(loaded, texts, configs, processing_class, trial, bar.update)
    _save(rows, out, "quality.json")
    if out is not None:
        plot(rows, out / "quality.png")
    console.print(table(rows))


@bench_app.command()
def latency(
    model: Annotated[str | None, typer.Argument(help="Folder or Hub id; the demo model when left out.")] = None,
    keep: Annotated[float, typer.Option(help="Fraction of neurons and heads kept.")] = 0.5,
    batch_size: Annotated[int, typer.Option(help="Samples in the batch that is timed.", min=1)] = 32,
    length: Annotated[int, typer.Option(help="Tokens of a sample.", min=2)] = 128,
    rounds: Annotated[int, typer.Option(help="Forwards of each model.", min=1)] = 10,
    out: Out = None,
) -> None:
    """Whether a pruned text model is as much faster as its MACs promise: widths alike, and each layer its own."""
    from ..config import PruneConfig
    from ..data.datafiles import load_model
    from ..demo import demo_model_folder, docstrings
    from .latency import bench_latency, table

    loaded, processing_class = load_model(str(demo_model_folder()) if model is None else model)
    common: dict[str, Any] = {"keep": keep, "samples": 32, "held_out": 8}
    configs = [
        PruneConfig(**common),
        PruneConfig(**common, layout="ragged"),
        PruneConfig(**common, layout="ragged", round_to=32),
    ]
    rows = bench_latency(
        loaded, docstrings(40), configs, processing_class, batch_size=batch_size, length=length, rounds=rounds
    )
    _save(rows, out, "latency.json")
    console.print(table(rows))


@bench_app.command()
def budgets(
    model: Annotated[str | None, typer.Argument(help="Folder or Hub id; the demo model when left out.")] = None,
    data: Annotated[str | None, typer.Option(help="As for `prune`; docstrings when left out.")] = None,
    keep: Annotated[list[float] | None, typer.Option(help="Kept fraction; may be repeated.")] = None,
    allocations: Annotated[int, typer.Option(help="Random allocations to rank.", min=0)] = 40,
    samples: Annotated[int, typer.Option(help="Samples to calibrate on.", min=4)] = 128,
    max_length: Annotated[int, typer.Option(help="Tokens a sample is truncated to.", min=1)] = 128,
    split: Annotated[str | None, typer.Option(help="Split of the data set.")] = None,
    column: Annotated[str | None, typer.Option(help="Column to read.")] = None,
    out: Out = None,
) -> None:
    """Drift of each budget at each size, and whether predicted drift ranks random allocations as the actual does."""
    from transformers.utils import logging

    from ..config import PruneConfig
    from ..data.datafiles import load_data, load_model
    from ..demo import demo_model_folder, docstrings
    from .budgets import bench_budgets, table

    loaded, processing_class = load_model(str(demo_model_folder()) if model is None else model)
    config = PruneConfig(samples=samples, held_out=64, max_length=max_length)
    count = samples + config.held_out
    texts: Any = docstrings(count) if data is None else load_data(data, split=split, column=column)
    keeps = keep or [0.7, 0.5, 0.35]
    with logging.tqdm(total=3 * len(keeps) + allocations, desc="Allocations", disable=None) as bar:
        rows = bench_budgets(
            loaded, texts, config, processing_class, keeps=keeps, allocations=allocations, advanced=bar.update
        )
    _save(rows, out, "budgets.json")
    console.print(table(rows))


@bench_app.command()
def scale(
    layers: Annotated[list[int] | None, typer.Option(help="Number of layers; may be repeated.")] = None,
    samples: Annotated[list[int] | None, typer.Option(help="Samples to calibrate on; may be repeated.")] = None,
    width: Annotated[int, typer.Option(help="Hidden size.", min=8)] = 512,
    out: Out = None,
) -> None:
    """Memory of pruning a checkpoint layer by layer, over the number of layers and of samples."""
    from transformers.utils import logging

    from .scale import LAYERS, SAMPLES, bench_scale, table

    depths, counts = layers or list(LAYERS), samples or list(SAMPLES)
    with logging.tqdm(total=len(depths) + len(counts) - 1, desc="Checkpoints", disable=None) as bar:
        rows = bench_scale(depths, counts, width, bar.update)
    _save(rows, out, "scale.json")
    console.print(table(rows))


@bench_app.command()
def processes(
    count: Annotated[list[int] | None, typer.Option(help="Number of processes; may be repeated.", min=1)] = None,
    layers: Annotated[int, typer.Option(help="Number of layers.", min=1)] = 4,
    samples: Annotated[int, typer.Option(help="Samples to calibrate on.", min=4)] = 512,
    width: Annotated[int, typer.Option(help="Hidden size.", min=8)] = 256,
    out: Out = None,
) -> None:
    """Seconds of the calibration stage in one process and in several on the CPU, one thread each."""
    from .processes import PROCESSES, bench_processes, table

    rows = bench_processes(count or PROCESSES, layers, samples, width)
    _save(rows, out, "processes.json")
    console.print(table(rows))


@bench_app.command()
def solver(
    size: Annotated[
        list[str] | None, typer.Option(help="Inputs x outputs of a synthetic problem, e.g. 1536x384; may be repeated.")
    ] = None,
    real: Annotated[int, typer.Option(help="MLPs of the demo model to add, at most 6.", min=0, max=6)] = 3,
    keep: Annotated[float, typer.Option(help="Fraction of the columns kept.")] = 0.5,
    out: Out = None,
) -> None:
    """Every way to select: seconds as a ratio to a Cholesky factorisation, speed against rank-one updates, error.

    And, on the demo model, the error on held-out rows with the shrinkage that cross-fitting chooses and with others.
    """
    from rich.table import Table

    from .real import bench_shrinkage, demo_problems
    from .solver import bench_solver

    sizes = [tuple(map(int, text.split("x"))) for text in size or ["384x96", "1536x384", "3072x768"]]
    problems = demo_problems(count=real) if real else {}
    given = {name: (problem.total, problem.W) for name, problem in problems.items()}
    rows = bench_solver([(n, m) for n, m in sizes], keep=keep, problems=given)
    _save(rows, out, "solver.json")
    shown = Table(title=f"Selecting {keep:.0%} of the columns", title_justify="left")
    for name in ("problem", "method", "seconds", "x Cholesky", "x faster than rank-one", "relative error", "swaps"):
        shown.add_column(name, justify="left" if name in ("problem", "method") else "right")
    for row in rows:
        faster = row["speedup_over_rank_one"]
        cells = [row["problem"], row["method"], f"{row['seconds']:.3f}", f"{row['ratio_to_cholesky']:.1f}"]
        cells += ["" if faster is None else f"{faster:.1f}", f"{row['relative_error']:.6f}", str(row["swaps"])]
        shown.add_row(*cells)
    console.print(shown)
    if not problems:
        return
    fits = {name: bench_shrinkage(problem, keep=keep) for name, problem in problems.items()}
    _save([{"problem": name, **fit} for name, fit in fits.items()], out, "shrinkage.json")
    shown = Table(title="Relative error on held-out rows, by lambda", title_justify="left")
    columns = list(next(iter(fits.values()))["errors"])
    for name in ("problem", *columns, "chosen"):
        shown.add_column(name, justify="left" if name == "problem" else "right")
    for name, fit in fits.items():
        shown.add_row(name, *(f"{fit['errors'][column]:.4f}" for column in columns), f"{fit['chosen']:.3g}")
    console.print(shown)


def _save(rows: list[dict[str, Any]], out: Path | None, name: str) -> None:
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
