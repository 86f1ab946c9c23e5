"""The command line's MODEL and DATA: a name or a path to what the Python interface takes."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import transformers
from datasets import IterableDataset, interleave_datasets, load_dataset
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModel, AutoProcessor, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME, FEATURE_EXTRACTOR_NAME, PROCESSOR_NAME, logging

from ..runs.memory import is_of_the_machine
from ..runs.processes import state
from .images import is_picture
from .sounds import SOUND_KINDS, is_file, is_stored, undecoded
from .texts import COMPLETIONS, PAIRS

logger = logging.get_logger(__name__)

# The reader of `datasets` for each kind of file.
_READERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_WEIGHTED = re.compile(r"(.+)=(\d*\.?\d+)")
_WHERE = ("revision", "subfolder", "token", "trust_remote_code")
_PROCESSING = (PROCESSOR_NAME, FEATURE_EXTRACTOR_NAME, "tokenizer.json", "tokenizer_config.json")
_IMAGES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


def load_data(
    source: str, *, split: str | None = None, column: str | None = None, labels: bool = False
) -> IterableDataset:
    """Open data as a stream.

    Args:
        source: A `.txt` (a sample per line), `.jsonl`, `.json`, `.csv` or `.parquet` file, a folder of such files, of
            images or of sounds (with folders inside, and a `metadata.jsonl` of further columns for each `file_name`),
            or the id of a data set on the Hub, `"id:name"` for one of its configurations.
        split: Of a Hub data set, or of a folder with names such as `train` and `test` in it; the train split, or the
            first one, when left out. A file is one split, `"train"`.
        column: The only column to read, or `"first,second"` for a pair of sentences; found later when left out.
        labels: Whether the folders that images or sounds lie in are their labels.

    Raises:
        FileNotFoundError: the source is neither a file, a folder nor a data set on the Hub.
        ValueError: the file is of another kind, holds nothing, cannot be read, or has no such split or column.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        kinds = {file.suffix.lower() for file in path.rglob("*")}
        builder = "imagefolder" if kinds & _IMAGES else "audiofolder" if kinds & SOUND_KINDS else None
        if builder is not None:
            data = _open(builder, split, {"data_dir": str(path), "drop_labels": not labels})
        elif kinds & set(_READERS):
            data = _open(str(path), split, {})
        else:
            raise ValueError(f"The folder {path} holds no images, no sounds and no {_file_kinds()} file.")
    elif path.is_file():
        if path.suffix.lower() not in _READERS:
            raise ValueError(
                f"{path} cannot be read as data: give a {_file_kinds()} file, or a folder of these, of images or of "
                "sounds."
            )
        data = _open(_READERS[path.suffix.lower()], split, {"data_files": str(path)})
    elif path.suffix.lower() in _READERS or path.is_absolute() or source.startswith((".", "~")):
        raise FileNotFoundError(f"No file or folder {path}.")
    else:
        data = _open_from_hub(source, split)
    return data if column is None else _select(data, source, column)


def load_mixture(
    sources: Sequence[str], *, split: str | None = None, column: str | None = None, seed: int = 0
) -> IterableDataset:
    """Open several data sets as one stream, in which samples of each come up as often as its weight says.

    Args:
        sources: As for `load_data`, each with its weight behind an equals sign or without one, `"code.jsonl=0.3"`; a
            weight left out is 1. Weights are relative to one another. One source alone is opened as it is.
        split: As for `load_data`, of each of them.
        column: As for `load_data`, of each of them.
        seed: Of the draws.

    Raises:
        FileNotFoundError, ValueError: as `load_data`; a weight is not positive.
    """
    parts = [_WEIGHTED.fullmatch(source) for source in sources]
    names = [part[1] if part else source for part, source in zip(parts, sources, strict=True)]
    weights = [float(part[2]) if part else 1.0 for part in parts]
    if not all(weights):
        raise ValueError(f"Weights of data sets must be positive, got {', '.join(sources)}.")
    opened = [load_data(name, split=split, column=column) for name in names]
    if len(opened) == 1:
        return opened[0]
    shares = [weight / sum(weights) for weight in weights]
    return interleave_datasets(
        [_with_usual_name(data) for data in opened], shares, seed=seed, stopping_strategy="all_exhausted"
    )


def _with_usual_name(data: IterableDataset) -> IterableDataset:
    """The data with its only column of strings called `"text"`, as that of the others, and without further columns.

    Of images and sounds, all columns.
    """
    row = next(iter(data))
    if any(is_picture(value) or is_stored(value) or is_file(value) for value in row.values()):
        return data
    strings = [name for name, value in row.items() if isinstance(value, str)]
    if "text" in strings:
        return data.select_columns(["text"])
    return data.select_columns(strings).rename_column(strings[0], "text") if len(strings) == 1 else data


def _file_kinds() -> str:
    return ", ".join(list(_READERS)[:-1]) + f" or {list(_READERS)[-1]}"


def _open(reader: str, split: str | None, arguments: dict[str, Any]) -> IterableDataset:
    source = arguments.get("data_files") or arguments.get("data_dir") or reader
    try:
        splits = load_dataset(reader, streaming=True, **arguments)
    except Exception as error:  # readers raise their own library's errors
        raise ValueError(f"{source} cannot be read: {error}") from error
    data = _one_split(splits, str(source), split)
    try:
        first = next(iter(data), None)
    except Exception as error:  # readers raise their own library's errors
        raise ValueError(f"{source} cannot be read: {error}") from error
    if first is None:
        raise ValueError(f"{source} holds no samples.")
    return data


def _open_from_hub(source: str, split: str | None) -> IterableDataset:
    name, _, configuration = source.partition(":")
    try:
        splits = load_dataset(name, configuration or None, streaming=True)
    except (FileNotFoundError, ConnectionError, HFValidationError) as error:
        raise FileNotFoundError(
            f"{source!r} is no file or folder here, and no data set on the Hub could be opened by that name: {error}"
        ) from error
    return _one_split(splits, source, split)


def _one_split(splits: Mapping[str, IterableDataset], source: str, split: str | None) -> IterableDataset:
    if split is None:
        split = "train" if "train" in splits else next(iter(splits))
    if split not in splits:
        known = f"choose one of {', '.join(map(repr, splits))}"
        if Path(source).is_file():
            known = "a file is not split as data sets of the Hub are: leave the split out"
        raise ValueError(f"The data set {source} has no split {split!r}, {known}.")
    return undecoded(splits[split])


def _select(data: IterableDataset, source: str, column: str) -> IterableDataset:
    columns = data.column_names or list(next(iter(data), {}))
    names = [column] if column in columns else [name.strip() for name in column.split(",")]
    if missing := [name for name in names if name not in columns]:
        raise ValueError(f"{source} has no column {missing[0]!r}, choose one of {', '.join(map(repr, columns))}.")
    data = data.select_columns(names)
    if len(names) == 2 and tuple(names) not in (*COMPLETIONS, *PAIRS):
        data = data.rename_columns(dict(zip(names, PAIRS[0], strict=True)))
    return data


def load_model(
    name_or_path: str,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    auto_class: Any = None,
    options: Mapping[str, Any] | None = None,
) -> tuple[PreTrainedModel, Any]:
    """Load a model as the class that it was saved as, so that its head is kept, and what makes its inputs.

    Args:
        name_or_path: Local folder or Hub id.
        dtype: Of the weights; `"auto"` keeps the saved one.
        device: Where to; an accelerator when there is one, when left out.
        auto_class: An `AutoModel...` class, for configs that do not name a class of transformers.
        options: Further arguments of `from_pretrained`, such as `device_map`, which places the model instead,
            `attn_implementation`, `revision`, `subfolder`, `token` and `trust_remote_code`.

    Returns:
        The model in evaluation mode, and its processor, tokenizer, image processor or feature extractor, whichever
        of them was saved first in this order; `None` when none was.

    Raises:
        OSError: there is no such model.
        ValueError: there is no such device; the weights are damaged, or others than its config describes.
    """
    options = dict(options or {})
    where = {name: options[name] for name in _WHERE if name in options}
    if device is not None:
        _check_device(device)
    config = _config_of(name_or_path, where)
    own = getattr(transformers, (config.architectures or [""])[0], AutoModel)
    remote = _class_of_remote_code(config, options)
    loader = auto_class or remote or own
    try:
        model = loader.from_pretrained(name_or_path, dtype=dtype, **options)
    except (SafetensorError, UnpicklingError, EOFError, KeyError, RuntimeError) as error:
        if is_of_the_machine(error):
            raise
        code = "" if remote is None else f"The code that comes with {name_or_path} failed, or: "
        raise ValueError(
            f"{code}The weights of {name_or_path} are damaged, or not those that its {CONFIG_NAME} describes: {error}"
        ) from error
    if "device_map" not in options:
        model = model.to(device or state().device)  # of several processes, each has its own
    return model.eval(), load_processing_class(name_or_path, where)


def _check_device(device: str | torch.device) -> None:
    """Refuse a device that is not here before anything is read."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"The device {str(device)!r} cannot be used here: {str(error).splitlines()[0]}") from error


def _config_of(name_or_path: str, where: Mapping[str, Any]) -> Any:
    folder = Path(name_or_path)
    if folder.is_dir() and not (folder / where.get("subfolder", "") / CONFIG_NAME).is_file():
        adapter = (folder / ADAPTER_CONFIG_NAME).is_file()
        merge = " It holds an adapter: merge it into its model, and save that." if adapter else ""
        raise FileNotFoundError(f"{folder} holds no {CONFIG_NAME}, as `save_pretrained` writes it.{merge}")
    with missing_named(name_or_path):
        return AutoConfig.from_pretrained(name_or_path, **where)


@contextmanager
def missing_named(name_or_path: str) -> Iterator[None]:
    """What is no folder here is taken to be on the Hub, whose errors do not say that it is none.

    Raises:
        FileNotFoundError: there is neither.
    """
    path = Path(name_or_path)
    try:
        yield
    except (OSError, HFValidationError) as error:
        if path.exists():
            raise
        if path.is_absolute() or name_or_path.startswith((".", "~")):
            raise FileNotFoundError(f"No folder {path}.") from error
        raise FileNotFoundError(
            f"{name_or_path!r} is no folder here, and no model on the Hub could be opened by that name: {error}"
        ) from error


def _class_of_remote_code(config: Any, options: Mapping[str, Any]) -> Any:
    """The class of transformers that loads code which comes with a model, where that may run."""
    named = getattr(config, "auto_map", None) or {}
    models = [name for name in named if name.startswith("AutoModel")]
    return getattr(transformers, max(models, key=len)) if models and options.get("trust_remote_code") else None


def load_processing_class(name_or_path: str, where: Mapping[str, Any] | None = None) -> Any:
    """The processor, tokenizer, image processor or feature extractor saved with a model; `None` without one.

    Args:
        name_or_path: Local folder or Hub id.
        where: `revision`, `subfolder`, `token` and `trust_remote_code`, as for `from_pretrained`.
    """
    try:
        processing_class = AutoProcessor.from_pretrained(name_or_path, **(where or {}))
    except (OSError, ValueError) as error:
        if any((Path(name_or_path) / name).is_file() for name in _PROCESSING):
            logger.warning(f"What makes inputs of data for {name_or_path} is there and cannot be loaded: {error}")
        return None
    # Where no tokenizer was saved, transformers makes one that knows its special tokens and nothing else.
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    if isinstance(tokenizer, PreTrainedTokenizerBase) and set(tokenizer.get_vocab()) <= set(
        tokenizer.all_special_tokens
    ):
        return None
    return processing_class
