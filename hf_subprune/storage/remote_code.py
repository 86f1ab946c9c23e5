"""Loading ragged models where hf_subprune is not installed: `from_pretrained(..., trust_remote_code=True)`.

A file of code beside the weights holds the classes that the config can build, each shaped to the stored widths when it
is constructed. It contains `forwards.py` and `spec.py` as they are, so both ways of loading run the same code.
"""

import inspect
import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.utils import CONFIG_NAME, logging

from ..models import forwards
from . import spec
from .entry import ENTRY, NOT_READ, OR_TRUST, WEIGHTS_ENTRY

logger = logging.get_logger(__name__)

MODULE = "modeling_subprune"
"""Name of the file of code, without `.py`."""

_PRUNED = (
    f"""

_NOT_READ = {NOT_READ.format(OR_TRUST)!r}
"""
    + '''

class _Pruned:
    """Builds the model that its config describes, then shrinks it to the widths that the config lists."""

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        entry = getattr(config, "subprune", None)
        if entry is not None:
            apply_spec(self, LayoutSpec.from_dict(entry))

    @classmethod
    def from_pretrained(cls, name, *args, config=None, **kwargs):
        # It names no file, so that nothing else loads these weights.
        if getattr(config, "transformers_weights", None) is not None:
            config = copy.deepcopy(config)
            del config.transformers_weights
        return super().from_pretrained(name, *args, config=config, **kwargs)

    def save_pretrained(self, folder, *args, **kwargs):
        super().save_pretrained(folder, *args, **kwargs)
        file = os.path.join(folder, "config.json")
        if os.path.isfile(file):
            with open(file, encoding="utf-8") as text:
                values = json.load(text)
            with open(file, "w", encoding="utf-8") as text:
                json.dump({**values, "transformers_weights": _NOT_READ}, text, indent=2, sort_keys=True)

    @classmethod
    def is_custom_code(cls):
        # The names of the tensors are those of transformers, whose conversions from names in older files apply.
        return False
'''
)

_CLASS = '''

class {name}(_Pruned, {module}.{name}):
    """{name} with pruned layers."""
'''


def complete(folder: str | Path, model: PreTrainedModel) -> None:
    """Write beside a ragged model that was just saved what loading it takes, and what stops those who cannot read it.

    Args:
        folder: Where `model.save_pretrained` wrote `model`.
        model: The ragged model.
    """
    try:
        write_remote_code(folder, model)
        missing = NOT_READ.format(OR_TRUST)
    except ValueError as error:
        logger.warning("The model will load with hf_subprune only: %s", error)
        missing = NOT_READ.format("")
    file = Path(folder) / CONFIG_NAME
    _write(file, {**json.loads(file.read_text(encoding="utf-8")), WEIGHTS_ENTRY: missing})


def write_remote_code(folder: str | Path, model: PreTrainedModel) -> Path:
    """Add to a saved ragged model the code that loads it without hf_subprune, and name it in its config.json.

    All classes that transformers builds from this config get one: an encoder that was pruned inside a classifier loads
    alone too. With hf_subprune installed nothing changes, whether the code is trusted or not.

    Args:
        folder: Where `model.save_pretrained` wrote `model`.
        model: The ragged model.

    Returns:
        The file written.

    Raises:
        ValueError: `folder` holds no saved ragged model, or its model needs remote code of its own, or is of a class
            that is not part of transformers.
    """
    config_file = Path(folder) / CONFIG_NAME
    config = json.loads(config_file.read_text(encoding="utf-8")) if config_file.exists() else {}
    if ENTRY not in config:
        raise ValueError(
            f"{folder} holds no ragged model: call save_pretrained({str(folder)!r}) first; a model with the stock "
            "layout needs no remote code"
        )
    foreign = [target for target in config.get("auto_map", {}).values() if MODULE not in target]
    if foreign:
        raise ValueError(
            f"{type(model).__name__} comes from remote code itself ({foreign[0]}); loading it takes that code and "
            "hf_subprune. Remove auto_map from its config.json if the class is part of transformers by now"
        )
    native = _native_class(type(model))
    classes = {auto: cls for auto, cls in auto_classes(model.config).items() if _is_native(cls)}
    config["auto_map"] = {auto: f"{MODULE}.{cls.__name__}" for auto, cls in classes.items()}
    _write(config_file, config)
    file = Path(folder) / f"{MODULE}.py"
    file.write_text(_source({native, *classes.values()}), encoding="utf-8")
    return file


def auto_classes(config: PreTrainedConfig) -> dict[str, type[PreTrainedModel]]:
    """Name of each `AutoModel...` that builds a model from `config` -> the class that it builds."""
    found = {}
    for name, auto in vars(modeling_auto).items():
        mapping = getattr(auto, "_model_mapping", None) if name.startswith("AutoModel") else None
        if mapping is not None and type(config) in mapping:
            classes = mapping[type(config)]
            found[name] = classes[0] if isinstance(classes, tuple) else classes
    return found


def _native_class(cls: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The class of transformers that `cls` is, or that it was made from by the code that `write_remote_code` wrote.

    Raises:
        ValueError: it is of somebody's own, of which a file beside the weights cannot import the code.
    """
    native = [base for base in cls.__mro__ if _is_native(base)]
    if not native:
        raise ValueError(
            f"{cls.__name__} is defined in {cls.__module__!r}, not in transformers: it loads where its code and "
            "hf_subprune are imported before from_pretrained"
        )
    return native[0]


def _is_native(cls: type) -> bool:
    return cls.__module__.startswith("transformers.models.")


def _write(file: Path, config: dict[str, Any]) -> None:
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _source(classes: set[type[PreTrainedModel]]) -> str:
    ordered = sorted(classes, key=lambda cls: cls.__name__)
    modules = "import os\n" + "\n".join(f"import {module}" for module in sorted({cls.__module__ for cls in ordered}))
    imported = next(
        line for line in inspect.getsource(spec).splitlines(True) if line.startswith("from ..models.forwards")
    )
    shared = inspect.getsource(forwards) + "\n\n" + inspect.getsource(spec).replace(imported, f"{modules}\n", 1)
    return shared + _PRUNED + "".join(_CLASS.format(name=cls.__name__, module=cls.__module__) for cls in ordered)
