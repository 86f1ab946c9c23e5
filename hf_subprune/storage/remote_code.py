"""Loading ragged models where hf_subprune is not installed: `from_pretrained(..., trust_remote_code=True)`.

A file of code beside the weights holds the classes that the config can build, each shaped to the stored widths when it
is constructed. It contains `forwards.py` and `spec.py` as they are, so both ways of loading run the same code.
"""

import inspect
import json
from pathlib import Path

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from ..models import forwards
from . import spec
from .method import QUANT_METHOD

MODULE = "modeling_subprune"
"""Name of the file of code, without `.py`."""

_PRUNED = '''

class _Pruned:
    """Builds the model that its config describes, then shrinks it to the widths that the config lists."""

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        entry = getattr(config, "quantization_config", None)
        if entry is not None:
            apply_spec(self, LayoutSpec.from_dict(entry if isinstance(entry, dict) else entry.to_dict()))

    @classmethod
    def is_custom_code(cls):
        # The names of the tensors are those of transformers, whose conversions from names in older files apply.
        return False
'''

_CLASS = '''

class {name}(_Pruned, {module}.{name}):
    """{name} with pruned layers."""
'''


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
    config_file = Path(folder) / "config.json"
    config = json.loads(config_file.read_text(encoding="utf-8")) if config_file.exists() else {}
    if config.get("quantization_config", {}).get("quant_method") != QUANT_METHOD:
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
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
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


def _source(classes: set[type[PreTrainedModel]]) -> str:
    ordered = sorted(classes, key=lambda cls: cls.__name__)
    modules = "\n".join(f"import {module}" for module in sorted({cls.__module__ for cls in ordered}))
    imported = next(
        line for line in inspect.getsource(spec).splitlines(True) if line.startswith("from ..models.forwards")
    )
    shared = inspect.getsource(forwards) + "\n\n" + inspect.getsource(spec).replace(imported, f"{modules}\n", 1)
    return shared + _PRUNED + "".join(_CLASS.format(name=cls.__name__, module=cls.__module__) for cls in ordered)
