"""The command `evaluate`."""

import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from ..config import PruneConfig
from ..runs.stages import (
    COMPARING,
    LOADING_ORIGINAL,
    LOADING_PRUNED,
    OPENING,
    SCORING_ORIGINAL,
    SCORING_PRUNED,
    TIMING,
    begin,
)
from .help import HelpAll
from .options import RESULT, Columns, Data, Json, Label, MetricName, Quiet, Split, TaskName, loading_options
from .output import give, give_json, running


@loading_options
def evaluate(
    loading: dict[str, Any],
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Folder or Hub id of the pruned model.")],
    against: Annotated[str, typer.Option(help="Local folder or Hub id of the original model.", metavar="MODEL")],
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
    save: Annotated[
        bool,
        typer.Option(
            "--save", help="Add the task's figures to the report in DIR, and so to its card.", rich_help_panel=RESULT
        ),
    ] = False,
    quiet: Quiet = False,
    as_json: Json = False,
    help_all: HelpAll = False,
) -> None:
    """Compare a pruned model with the original: size, latency, drift of the output, and a task.

    A task's figures come with 95% intervals of the paired bootstrap over samples.

    Example: hf-subprune evaluate smaller --against MODEL --data test.txt
    """
    if task is None and (metric or label or save):
        raise ValueError("--metric, --label and --save belong to a task: name it with --task.")
    if task is not None and len(data) > 1:
        raise ValueError("A task has one data set: give one --data.")
    if save and not Path(folder).is_dir():
        raise ValueError(f"--save adds to the report in DIR, a local folder that `prune` wrote; got {folder!r}.")
    stages = (LOADING_ORIGINAL, LOADING_PRUNED, OPENING, TIMING, COMPARING)
    with running(stages if task is None else (*stages, SCORING_ORIGINAL, SCORING_PRUNED), quiet):
        from ..data.datafiles import load_mixture, load_model
        from ..evaluation.comparison import compare
        from ..evaluation.metrics import load_metric
        from ..evaluation.tasks import Trial, load_task
        from ..report.records import REPORT_NAME
        from ..report.report import PruneReport
        from ..report.tables import example_table, metric_table

        report = PruneReport.load(folder) if save else None
        if report is not None and not os.access(Path(folder) / REPORT_NAME, os.W_OK):
            raise PermissionError(f"--save cannot write {Path(folder) / REPORT_NAME}: allow it, or leave --save out.")
        chosen = load_metric(metric) if metric else None
        begin(LOADING_ORIGINAL)
        original, processing_class = load_model(against, **loading)
        begin(LOADING_PRUNED)
        pruned, _ = load_model(folder, **_of_the_pruned(loading))
        config = PruneConfig(samples=samples or 128, max_length=max_length, batch_size=batch_size)
        begin(OPENING)
        metrics: Any = ()
        if task is None:
            inputs = load_mixture(data, split=split, column=column)
        else:
            words: dict[str, Any] = {"split": split, "column": column, "label": label, "samples": samples}
            evaluated = load_task(task, data[0], processing_class, config, **words)
            inputs = evaluated.inputs()
        compared = compare(original, pruned, inputs, config, processing_class)
        if task is not None:
            metrics = Trial(evaluated, original, chosen).score(pruned)
        if report is not None:
            report.with_metrics(metrics).save(folder)
    if as_json:
        give_json({**compared.to_dict(), "metrics": [asdict(one) for one in metrics]})
        return
    give(compared.table())
    if metrics:
        give(*filter(None, (metric_table(metrics), example_table(metrics))))
    if report is not None:
        give(f"Added to the report in {folder}.")


def _of_the_pruned(loading: dict[str, Any]) -> dict[str, Any]:
    """A revision and a folder within a repo are those of the original."""
    own = {name: value for name, value in loading["options"].items() if name not in ("revision", "subfolder")}
    return {**loading, "options": own}
