"""The command `prune`."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from ..config import PruneConfig
from ..runs.stages import (
    FINDING,
    GENERATING,
    LOADING,
    OPENING,
    PRUNING,
    PUSHING,
    READING,
    SAVING,
    SHRINKING,
    SURVEYING,
    begin,
    expect,
    with_experts,
)
from .help import HelpAll
from .options import (
    RESULT,
    RUN,
    Column,
    DataFree,
    Json,
    Mixture,
    Model,
    Overwrite,
    Quiet,
    Split,
    config_options,
    loading_options,
)
from .output import command_line, give, give_json, running

# Parameters that are written in a second, about.
_SAVED_A_SECOND = 1e8


@dataclass(frozen=True)
class _Asked:
    """What of a command is the same for every way to run it.

    Args:
        model: Name or path.
        configs: One a size.
        out: Folder.
        data: Sources of samples; a model makes them up without.
        split, column: Of the data.
        loading: Arguments of `load_model`.
        max_shard_size: Of one file of weights.
        push: Repo that the result goes to.
    """

    model: str
    configs: Sequence[PruneConfig]
    out: Path
    data: Sequence[str] | None
    split: str | None
    column: str | None
    loading: dict[str, Any]
    max_shard_size: str
    push: str | None

    def opened(self) -> Any:
        """The data, as a stream; `None` where the model makes it up."""
        from ..data.datafiles import load_mixture

        begin(OPENING)
        if not self.data:
            return None
        return load_mixture(self.data, split=self.split, column=self.column, seed=self.configs[0].seed)

    def loaded(self, samples: Any) -> tuple[Any, Any, Any]:
        """The model, its processing class, and the samples, made up where there are none."""
        from ..data.datafiles import load_model

        begin(LOADING)
        model, processing_class = load_model(self.model, **self.loading)
        expect({SAVING: model.num_parameters() / _SAVED_A_SECOND, PUSHING: 0.0})
        return model, processing_class, _made_up(model, processing_class, self.configs) if samples is None else samples


@config_options
@loading_options
def prune(
    configs: list[PruneConfig],
    loading: dict[str, Any],
    model: Model,
    data: Mixture = None,
    data_free: DataFree = False,
    split: Split = None,
    column: Column = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the pruned model and its report.", metavar="DIR", rich_help_panel=RESULT),
    ] = None,
    overwrite: Overwrite = False,
    push: Annotated[
        str | None,
        typer.Option(help="Hub repo to push the result to.", metavar="USER/NAME", rich_help_panel=RESULT),
    ] = None,
    as_json: Json = False,
    max_shard_size: Annotated[
        str,
        typer.Option(
            help="Of one file of weights; with --offload, one is in memory when it is written.",
            hidden=True,
            rich_help_panel=RESULT,
        ),
    ] = "2GB",
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Only say blocks, sizes, time and memory.", rich_help_panel=RUN),
    ] = False,
    offload: Annotated[
        bool,
        typer.Option("--offload", help="One layer in memory; goes on after a stop.", rich_help_panel=RUN),
    ] = False,
    quiet: Quiet = False,
    help_all: HelpAll = False,
) -> None:
    """Prune a model on unlabeled samples and save it.

    Example: hf-subprune prune MODEL --data texts.txt --out smaller --keep 0.5
    """
    if data_free == bool(data):
        raise ValueError("Give --data DATA, or --data-free for text that the model makes up itself.")
    if data_free and (split or column or offload):
        raise ValueError("--data-free generates with the model in memory: leave --split, --column and --offload out.")
    if out is None and not dry_run:
        raise ValueError("Give --out DIR, the folder for the pruned model.")
    _check_together(configs, offload, dry_run, push, loading)
    folder = out or Path()
    asked = _Asked(model, configs, folder, data, split, column, loading, max_shard_size, push)
    if dry_run:
        _dry_run(asked, quiet, as_json)
        return
    with running(_stages(asked), quiet):
        from ..report.saving import check_shard_size

        check_shard_size(max_shard_size)
        if push is not None:
            from ..report.hub import check_repo_name

            check_repo_name(push)
        if not overwrite:
            refuse_earlier(folder, offload=offload)
        alone = _offloaded if offload else _in_memory
        reports = _sizes(asked) if len(configs) > 1 else {folder: alone(asked)}
        pushed = _pushed(asked)
    _give(reports, pushed, as_json)


def _check_together(
    configs: Sequence[PruneConfig], offload: bool, dry_run: bool, push: str | None, loading: dict[str, Any]
) -> None:
    """Refuse options that do not go together."""
    if dry_run and (offload or len(configs) > 1):
        raise ValueError("--dry-run runs the model in memory, for one size: leave --offload out, and give one --keep.")
    if len(configs) > 1 and offload:
        raise ValueError("--offload takes one size: give one value of --keep.")
    if len(configs) > 1 and push is not None:
        raise ValueError("--push takes one size: push the folder of the one you want with `hf-subprune push`.")
    if offload and loading["options"]:
        names = ", ".join("--" + name.replace("_", "-") for name in loading["options"])
        raise ValueError(
            f"--offload reads the files of a checkpoint itself and takes no {names}: give it a folder, such as one "
            "that `hf download MODEL --revision R --local-dir DIR` makes."
        )


def _dry_run(asked: _Asked, quiet: bool, as_json: bool) -> None:
    made_up = () if asked.data else (GENERATING,)
    with running((OPENING, LOADING, *made_up, READING, FINDING), quiet):
        from ..allocation.dry_run import foresee

        model, processing_class, samples = asked.loaded(asked.opened())
        foreseen = foresee(model, samples, asked.configs[0], processing_class)
    if as_json:
        give_json(foreseen.to_dict())
    else:
        give(foreseen.table())


def _stages(asked: _Asked) -> Sequence[str]:
    configs = asked.configs
    made_up = () if asked.data else (GENERATING,)
    if len(configs) > 1:
        return (OPENING, LOADING, *made_up, *SURVEYING, *(len(configs) * (*SHRINKING, SAVING)))
    pushing = () if asked.push is None else (PUSHING,)
    return (OPENING, LOADING, *made_up, *with_experts(PRUNING, configs[0].units), SAVING, *pushing)


def refuse_earlier(folder: Path, *, offload: bool = False) -> None:
    """Leave an earlier result alone, unless it is that of a run that was stopped while it was put in place.

    Raises:
        FileExistsError: there is one.
    """
    from ..report.records import REPORT_NAME

    found = [path for path in (folder / REPORT_NAME, *folder.glob(f"*/{REPORT_NAME}")) if path.is_file()]
    if found and not (offload and (folder.parent / f".{folder.name}.partial").is_dir()):
        raise FileExistsError(
            f"{found[0].parent} holds the result of an earlier run: give --overwrite to replace it, or another --out."
        )


def _sizes(asked: _Asked) -> dict[Path, Any]:
    from ..runs.processes import processes
    from ..sizes import check_sizes, save_sizes

    if processes() > 1:
        raise ValueError("Several processes prune to one size at a time: give one value of --keep.")
    check_sizes(asked.out, asked.configs)
    model, processing_class, samples = asked.loaded(asked.opened())
    options: dict[str, Any] = {"max_shard_size": asked.max_shard_size, "command": command_line()}
    return save_sizes(asked.out, model, samples, asked.configs, processing_class, **options)


def _offloaded(asked: _Asked) -> Any:
    from ..checkpoint import prune_checkpoint
    from ..report.saving import check_output

    check_output(asked.out)
    options = {**asked.loading, "max_shard_size": asked.max_shard_size, "command": command_line()}
    del options["options"]
    return prune_checkpoint(asked.model, asked.opened(), asked.configs[0], asked.out, **options)


def _in_memory(asked: _Asked) -> Any:
    from ..pruning import prune as prune_model
    from ..report.place import claimed
    from ..report.saving import save_to
    from ..runs.processes import state

    with claimed(asked.out) if state().is_main_process else nullcontext() as place:
        model, processing_class, samples = asked.loaded(asked.opened())
        report = prune_model(model, samples, asked.configs[0], processing_class)
        report = replace(report, command=command_line())
        if place is not None:
            begin(SAVING)
            save_to(place, model, processing_class, report, {"max_shard_size": asked.max_shard_size})
    return report


def _made_up(model: Any, tokenizer: Any, configs: Sequence[PruneConfig]) -> list[str]:
    """Text for configs that differ in size alone; of several processes, all read that of the first."""
    from ..data.generation import generated_text
    from ..runs.processes import from_process

    begin(GENERATING)
    config = configs[0]
    options = {"max_length": config.max_length, "batch_size": config.batch_size, "seed": config.seed}
    return from_process(0, generated_text(model, tokenizer, config.samples + config.held_out, **options))


def _pushed(asked: _Asked) -> str | None:
    from ..runs.processes import state

    if asked.push is None or not state().is_main_process:
        return None
    from ..report.hub import push_folder

    begin(PUSHING)
    return str(push_folder(asked.out, asked.push).commit_url)


def _give(reports: dict[Path, Any], pushed: str | None, as_json: bool) -> None:
    from ..report.tables import block_table, summary_table
    from ..sizes import size_table

    if as_json:
        told = {str(folder): report.to_dict() for folder, report in reports.items()}
        if len(told) > 1:
            give_json({"sizes": told})
        else:
            ((folder, values),) = told.items()
            give_json({"folder": folder, "pushed": pushed, **values})
        return
    if len(reports) > 1:
        give(size_table(list(reports.values())))
    else:
        (report,) = reports.values()
        give(summary_table(report), block_table(report))
    give("Saved to " + ", ".join(map(str, reports)) + ".")
    if pushed is not None:
        give(f"Pushed: {pushed}")
