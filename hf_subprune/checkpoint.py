"""Prune a checkpoint that does not fit in memory: layer by layer from its files to new ones, and on after a stop."""

import hashlib
import json
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging

from .allocation.surveying import take_survey
from .blocks import some_of
from .config import PruneConfig
from .data.batches import FittingBatches, Samples
from .data.datafiles import load_processing_class, missing_named
from .data.reading import read
from .models.session import check_prunable, session
from .pruning import prune_to
from .report.place import Place, claimed
from .report.report import PruneReport
from .report.saving import check_shard_size, save_to
from .runs.durable import DamagedError, check_space, digest_of, read_json, write_json
from .runs.memory import freed_at_once
from .runs.processes import from_process, processes, state
from .runs.progress import displays
from .runs.stages import LOADING, PRUNING, READING, SAVING, begin, expect, shown
from .runs.workspace import Workspace
from .storage.skeleton import build_skeleton

logger = logging.get_logger(__name__)

# Bytes that are written in a second, about.
_SAVED_A_SECOND = 2e8

# Weights that `from_pretrained` reads and that are no safetensors files of the usual name.
_OTHER_WEIGHTS = ("*.bin", "*.safetensors", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.gguf")


def prune_checkpoint(
    name_or_path: str | Path,
    data: Any,
    config: PruneConfig | Mapping[str, Any] | None = None,
    out: str | Path = "pruned",
    processing_class: Any = None,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    max_shard_size: int | str = "2GB",
    command: str = "",
) -> PruneReport:
    """As `prune`, with one layer in memory at a time, from a checkpoint on disk to one on disk.

    The layers' weights are read from the checkpoint's safetensors files when a layer runs and dropped behind it; what
    the calibration samples make of each layer, the sensitivities and the new weights lie in files beside `out`. In
    memory are what is outside of the layers (embeddings, the output head), one layer, the moments of its blocks, one
    batch, and experts that are stacked in one tensor. In float32 on a CPU, the weights are those that `prune` gives,
    to the last bit.

    In a script that `accelerate launch` starts, every process runs its share of the batches, as in `prune`, and has
    files of its own; the first one writes the result.

    After each layer, what was done is on disk. Started again with the same arguments, a run that was stopped, whatever
    stopped it, goes on behind the last layer that it finished and ends with the same files.

    Args:
        name_or_path: Folder or Hub id of a checkpoint in safetensors files.
        data: As for `prune`; the same again when a stopped run is started again.
        config: As for `prune`; any target but `latency`, which is measured on a model in memory.
        out: Folder of the pruned model; made if need be. An earlier result there is replaced, other files stay.
        processing_class: Of the data; the checkpoint's own when left out.
        dtype: Of the weights; `"auto"` keeps the saved one.
        device: Where layers run; an accelerator when there is one, when left out.
        max_shard_size: Of one file of weights, which is in memory when it is written.
        command: Put into the report.

    Returns:
        The report, which is saved in `out` as well; without latencies.

    Raises:
        FileNotFoundError: a file of the checkpoint is missing.
        ValueError: as `prune`; `out` holds something else; `max_shard_size` is no size; a file of the checkpoint is
            cut short; the run that was stopped had another model, config, data or number of processes: the message
            says what differs; or what it left is damaged.
        BlockingIOError: another run writes to `out` now.
        OSError: `out` cannot be made, or the disk has no room. What is finished stays, and the same call goes on.
    """
    config = PruneConfig.of(config)
    if config.latency is not None:
        raise ValueError("Latency is measured on a model in memory: choose another target, or use `prune`.")
    check_shard_size(max_shard_size)
    with (
        shown((LOADING, *PRUNING, SAVING), displays),
        claimed(out) if state().is_main_process else nullcontext() as place,
    ):
        begin(LOADING)
        # No process touches anything before it is claimed.
        started: Path = from_process(0, place.partial if place is not None else Path())
        scratch = started / str(state().process_index)
        source = _local(name_or_path)
        shards = check_shards(source)
        check_space(started, sum(path.stat().st_size for path in shards), "the pruned model")
        run = _Run.resumed(scratch)
        processing_class = processing_class or load_processing_class(str(source))
        model = _load(source, dtype, device, scratch / "converted")
        model.name_or_path = str(name_or_path)
        check_prunable(model, offloaded=True)
        work = Workspace()
        with freed_at_once(), session(model, folder=scratch / "new"):
            begin(READING)
            expect({SAVING: sum(path.stat().st_size for path in shards) / _SAVED_A_SECOND})
            with work.clock("data"):
                samples = read(model, data, config, processing_class)
            run.begin(_identity(source, shards, config, samples, model))
            batches = FittingBatches(samples)

            def attempt(some: Samples) -> PruneReport:
                folder = scratch / f"batches-of-{batches.size}"  # sums of other batches are others in the last bits
                own = Workspace(folder, work.again().clock)
                return prune_to(take_survey(some, [config], None, own), config, own)

            with run.damage_named():
                report = replace(batches.run(attempt), command=command)
        if place is not None:
            begin(SAVING)
            _save(place, model, processing_class, report, max_shard_size)
        state().wait_for_everyone()
        run.end()
        state().wait_for_everyone()
    return report


class _Run:
    """What is on disk of a run between its start and its end, in a folder of its own.

    A file says which run it is, with a checksum; nothing else there counts without it.

    Args:
        folder: Of one process.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._file = folder, folder / "run.json"

    @classmethod
    def resumed(cls, folder: Path) -> "_Run":
        """The run that was stopped there, if one was, ready to go on; weights are made again."""
        run = cls(folder)
        shutil.rmtree(folder / "new" if run._file.is_file() else folder, ignore_errors=True)
        (folder / "new").mkdir(parents=True)
        return run

    def begin(self, identity: Mapping[str, Mapping[str, Any]]) -> None:
        """Write down what this run is, or compare it with what the run that was stopped here was.

        Raises:
            ValueError: they differ, or the file that says so is damaged.
        """
        identity = json.loads(json.dumps(identity))
        if not self._file.is_file():
            write_json(self._file, identity)
            return
        with self.damage_named():
            before = read_json(self._file)
        changed = [
            f"{part} {name}: {before[part].get(name)!r} then, {identity[part].get(name)!r} now"
            for part in identity
            for name in sorted(before[part].keys() | identity[part].keys())
            if before[part].get(name) != identity[part].get(name)
        ]
        if changed:
            raise ValueError(
                f"A run that was stopped left {self.folder}, and this one differs from it in {'; '.join(changed)}. "
                "Start that one again to finish it, or remove the folder to begin this one."
            )
        logger.warning(f"Going on with the run that was stopped, from {self.folder}.")

    @contextmanager
    def damage_named(self) -> Iterator[None]:
        """What to do is said with what is damaged."""
        try:
            yield
        except (DamagedError, FileNotFoundError) as error:
            raise ValueError(
                f"The run that was stopped cannot go on: {error} Remove {self.folder.parent}, and start anew."
            ) from error

    def end(self) -> None:
        """Nothing is left; what is, if this is cut short, counts for nothing."""
        self._file.unlink()
        shutil.rmtree(self.folder)


def _save(
    place: Place, model: PreTrainedModel, processing_class: Any, report: PruneReport, max_shard_size: int | str
) -> None:
    try:
        with warnings.catch_warnings():
            # It saves a shard at a time, and says that a shard must fit in memory.
            warnings.filterwarnings("ignore", message="Attempting to save a model with offloaded modules")
            save_to(place, model, processing_class, report, {"max_shard_size": max_shard_size})
    except SafetensorError as error:
        raise OSError(
            f"{place.folder} could not be written: {error}. Make room and start the same command again."
        ) from error


def check_shards(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, each there and as long as its header says.

    Raises:
        FileNotFoundError: there is none, only weights of another format or name, or one that the index names is
            missing.
        ValueError: one is cut short.
    """
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    names = {SAFE_WEIGHTS_NAME}
    if index.is_file():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{index} names no files of weights: its 'weight_map', which says in which file each tensor is, is "
                "missing or damaged. Put the file back as it was, and start again."
            ) from error
    paths = sorted(folder / name for name in names)
    others = sorted(path.name for pattern in _OTHER_WEIGHTS for path in folder.glob(pattern))
    if others and not index.is_file() and not paths[0].is_file():
        if any(folder.glob("model-*-of-*.safetensors")):
            raise FileNotFoundError(f"The checkpoint {folder} lacks {index.name}: put the file back, and start again.")
        raise FileNotFoundError(
            f"The checkpoint {folder} has its weights in {some_of(others)} and not in {SAFE_WEIGHTS_NAME}, of which "
            "one layer at a time can be read. Convert it once, with room for all of it in memory: load the model with "
            "from_pretrained (variant='fp16' for files of that name), save it to a new folder with save_pretrained, "
            "its tokenizer or processor too, and prune that folder."
        )
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"The checkpoint {folder} lacks {path.name}: put the file back, and start again.")
        found, needed = path.stat().st_size, _needed_bytes(path)
        if found != needed:
            raise ValueError(
                f"{path} holds {found} bytes where its header asks for {needed}: it was cut short, or damaged. Put "
                "the whole file back, and start again."
            )
    return paths


def _needed_bytes(path: Path) -> int | None:
    """The length of a safetensors file by its header; `None` where that cannot be read."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:
            return 8 + length
        try:
            header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            return 8 + length + max(ends, default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            return None


def _local(name_or_path: str | Path) -> Path:
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    with missing_named(str(name_or_path)):
        return Path(snapshot_download(str(name_or_path), allow_patterns=patterns))


def _load(source: Path, dtype: Any, device: Any, folder: Path) -> PreTrainedModel:
    """The model with its layers on disk; `folder` takes weights that are stored in another form than they are used."""
    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(f"The config of {source} cannot be read: {error} Put its config.json back.") from error
    model_class = getattr(transformers, (config.architectures or [""])[0], None)
    if model_class is None:
        with torch.device("meta"):
            model_class = type(AutoModel.from_config(config))
    device = device or torch.accelerator.current_accelerator() or "cpu"
    placement = dict(_placement(build_skeleton(model_class, config), "", str(device)))
    return model_class.from_pretrained(source, dtype=dtype, device_map=placement, offload_folder=folder).eval()


def _placement(module: nn.Module, path: str, device: str) -> Iterator[tuple[str, str]]:
    """A device map: layers, the elements of the outermost containers, on disk, all else on the device."""
    if isinstance(module, (nn.ModuleList, nn.Sequential)):
        yield from ((f"{path}.{name}", "disk") for name, _ in module.named_children())
    elif any(isinstance(inside, (nn.ModuleList, nn.Sequential)) for inside in module.modules()):
        prefix = f"{path}." if path else ""
        yield from ((f"{prefix}{name}", device) for name in (*module._parameters, *module._buffers))
        for name, child in module.named_children():
            yield from _placement(child, f"{prefix}{name}", device)
    else:
        yield path, device


def _identity(
    source: Path, shards: list[Path], config: PruneConfig, samples: Samples, model: PreTrainedModel
) -> dict[str, dict[str, Any]]:
    """What must be the same for a stopped run to go on: of files their content, whatever their place and times."""
    digest = hashlib.sha256()
    for batch in (*samples.fit, *samples.held_out):
        for name, value in sorted(batch.items()):
            digest.update(name.encode())
            if isinstance(value, torch.Tensor):
                digest.update(str((value.dtype, tuple(value.shape))).encode())
                digest.update(value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    names = (CONFIG_NAME, GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME)
    described = [path for name in names if (path := source / name).is_file()]
    return {
        "config": config.to_dict(),
        "data": {**samples.description, "sha256": digest.hexdigest()},
        "model": {"dtype": str(model.dtype), "device": str(model.device)},
        "file": {path.name: digest_of(path) for path in (*described, *shards)},
        "processes": {"number": processes()},
        "versions": {name: version(name) for name in ("hf_subprune", "torch", "transformers")},
    }
