"""Loading and saving ragged models with plain `from_pretrained` and `save_pretrained`.

After `import hf_subprune`, the import of Transformers' models imports this module, which joins in at four places of
Transformers: where a config is read, where a model has been built from it, where weights were loaded, and where a
model is saved. A model whose config lists widths is shaped to them as soon as it is built, by `from_pretrained`, by
`from_config` or by its class, before it gets weights; it is an ordinary model then, and takes any quantization.

It is imported in the middle of imports of Transformers: what is imported above, they have finished with; the rest is
imported when a model is loaded.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from .storage.entry import WEIGHTS_ENTRY, listed, readable

CARRIED = "subprune_report"
"""Attribute of a model that was pruned: its report, which is written beside it when it is saved."""

_PUSHED = ("commit_message", "create_pr", "private", "revision", "token")
"""Options of `save_pretrained` that belong to a push."""


def carry(model: PreTrainedModel, report: Any) -> None:
    """Have a report written beside a model whenever it is saved: by its `accompany(folder)`."""
    setattr(model, CARRIED, report)


@contextmanager
def carried(model: PreTrainedModel, report: Any) -> Iterator[None]:
    """As `carry`, for the time being."""
    before = vars(model).pop(CARRIED, None)
    carry(model, report)
    try:
        yield
    finally:
        del vars(model)[CARRIED]
        if before is not None:
            carry(model, before)


def _from_dict(plain: Callable, cls: Any, config_dict: dict[str, Any], **kwargs: Any) -> Any:
    """A config from what config.json holds."""
    return plain(cls, readable(config_dict), **kwargs)


def _post_init(plain: Callable, model: PreTrainedModel) -> None:
    """The end of a model's constructor, and of those of models inside it."""
    plain(model)
    entry = listed(model.config)
    if entry is None:
        return
    constructors = _constructors()
    if any(holder is not model and listed(vars(holder).get("config")) is not None for holder in constructors):
        return  # the model around it is shaped as a whole
    from .storage.layout import write_ragged
    from .storage.spec import LayoutSpec, apply_spec

    try:
        write_ragged(model, apply_spec(model, LayoutSpec.from_dict(entry)))
    except ValueError:
        # A class that adds to another one calls this twice; only the second time everything is there.
        if sum(holder is model for holder in constructors) < 2:
            raise


def _constructors() -> list[PreTrainedModel]:
    """Models whose `__init__` is running, the innermost first; one is there once for each of its classes."""
    found, frame = [], sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        holder = frame.f_locals.get("self") if frame.f_code.co_name == "__init__" else None
        if isinstance(holder, PreTrainedModel):
            found.append(holder)
    return found


def _from_pretrained(plain: Callable, cls: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
    """A model with its weights.

    Raises:
        ValueError: the weights do not have the widths of the config, whatever `ignore_mismatched_sizes` says.
    """
    if isinstance(given := kwargs.get("config"), PreTrainedConfig) and hasattr(given, WEIGHTS_ENTRY):
        kwargs["config"] = type(given).from_dict(given.to_dict())  # it was read before this module was imported
    model, info = plain(cls, *args, output_loading_info=True, **kwargs)
    shapes = (listed(model.config) or {}).get("shapes", {})
    for name, shape, expected in sorted(info.get("mismatched_keys", ())):
        if name in shapes:
            raise ValueError(
                f"{model.config.name_or_path}: {name} has shape {tuple(shape)}, but the config.json beside it says "
                f"{tuple(expected)}: they were not saved together. Take both from the same save_pretrained"
            )
    return (model, info) if output_loading_info else model


def _save_pretrained(
    plain: Callable,
    model: PreTrainedModel,
    save_directory: Any,
    is_main_process: bool = True,
    *args: Any,
    push_to_hub: bool = False,
    **kwargs: Any,
) -> None:
    """Save a model with all that loading it takes, and with the report that it carries."""
    report = vars(model).get(CARRIED)
    ours = listed(model.config) is not None or report is not None
    plain(model, save_directory, is_main_process, *args, push_to_hub=push_to_hub and not ours, **kwargs)
    folder = Path(save_directory)
    if not (ours and is_main_process and (folder / "config.json").is_file()):
        return
    if listed(model.config) is not None:
        from .storage.remote_code import complete

        complete(folder, model)
    if report is not None:
        report.accompany(folder)
    if push_to_hub:
        options = {name: value for name, value in kwargs.items() if name in _PUSHED}
        model.push_to_hub(kwargs.get("repo_id", folder.name), **options)


def _join_in(holder: type, name: str, replacement: Callable, of_class: bool = False) -> None:
    """Put a function around a method of Transformers: it is given the method first, then what that is given."""
    held = vars(holder)[name]
    method = getattr(held, "__func__", held)
    plain = getattr(method, "replaced", method)  # after a reload, what is there is what an earlier import put there

    @functools.wraps(plain)
    def joined(*args: Any, **kwargs: Any) -> Any:
        return replacement(plain, *args, **kwargs)

    vars(joined)["replaced"] = plain
    setattr(holder, name, classmethod(joined) if of_class else joined)


def register() -> None:
    """Make Transformers know ragged models. Done on import; once more, after a reload, replaces the functions."""
    _join_in(PreTrainedConfig, "from_dict", _from_dict, of_class=True)
    _join_in(PreTrainedModel, "from_pretrained", _from_pretrained, of_class=True)
    _join_in(PreTrainedModel, "post_init", _post_init)
    _join_in(PreTrainedModel, "save_pretrained", _save_pretrained)


register()
