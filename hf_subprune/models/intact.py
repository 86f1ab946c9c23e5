"""A model that is exactly as it was, whatever ended what was done to it."""

from __future__ import annotations

import copy
import traceback
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from accelerate.hooks import SequentialHook
from torch import nn
from transformers import PreTrainedConfig

_T = TypeVar("_T")

_CONTAINERS = (dict, OrderedDict, list, set)


def intact(model: nn.Module, change: Callable[[], _T], *, written: Iterable[torch.Tensor] = ()) -> _T:
    """What `change` returns; whatever ends it before, an interrupt at any line too, the model is as it was.

    That is the last word, after what its own parts take back: modules hold the very objects that they held, with the
    same flags, hooks, configs and buffers. An interrupt is raised as such, though taking back fails that it cut short.

    Args:
        model: Any.
        change: Changes it, by objects that it replaces.
        written: Parameters of which it writes values; they are copied to the CPU's memory.
    """
    put_back = remembered(model, written)
    try:
        return change()
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)  # contexts that wait in generators end now, not behind this
        put_back()
        interrupt = _interrupt_behind(error)
        if interrupt in (None, error):
            raise
        raise interrupt from None


def _interrupt_behind(error: BaseException | None) -> BaseException | None:
    """The interrupt itself, or the one in whose handling something else was raised; `None` if there was none."""
    while isinstance(error, Exception):
        error = error.__context__
    return error


def remembered(model: nn.Module, written: Iterable[torch.Tensor] = ()) -> Callable[[], None]:
    """What puts everything back that modules hold, and values of buffers and of what is `written`; see `intact`."""
    states = [(vars(one), dict(vars(one))) for one in _holders(model)]
    held = [(one, copy.copy(one)) for _, state in states for one in state.values() if type(one) in _CONTAINERS]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    tensors = [*written, *(buffer for buffer in model.buffers() if buffer.device.type != "meta")]
    values = [(tensor, tensor.detach().to("cpu", copy=True)) for tensor in tensors]

    def put_back() -> None:
        for entries, before in [*states, *held]:
            entries.clear()
            (entries.extend if isinstance(entries, list) else entries.update)(before)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        with torch.no_grad():
            for tensor, value in values:
                if not torch.equal(tensor.cpu(), value):
                    tensor.copy_(value)

    return put_back


def _holders(model: nn.Module) -> list[Any]:
    """The modules, and what they hold that is changed in place: configs, and hooks of accelerate; each once."""
    found: dict[int, Any] = {}
    waiting: list[Any] = list(model.modules())
    while waiting:
        one = waiting.pop()
        if id(one) not in found:
            found[id(one)] = one
            inner = vars(one).values() if isinstance(one, (nn.Module, PreTrainedConfig)) else ()
            waiting += [value for value in inner if isinstance(value, PreTrainedConfig)]
            hook = vars(one).get("_hf_hook")
            waiting += [hook, *(hook.hooks if isinstance(hook, SequentialHook) else ())] if hook is not None else []
    return list(found.values())
