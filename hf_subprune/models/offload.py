"""Models whose weights lie elsewhere, on disk or in the CPU's memory: each linear reads its weight when it runs.

`accelerate` dispatches such models (`from_pretrained(..., device_map=...)`). Its hooks know nothing of pruning, so for
the time of a run they stand back, and a weight that is elsewhere is a *placeholder*: a parameter on the meta device,
of the right shape, that knows where its values lie and which of their rows or columns are left. Surgery exchanges
placeholders as it exchanges parameters, and reads nothing. All else (biases, norms, tables, and experts that are
stacked in one tensor) is held in memory.
"""

import itertools
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes
from transformers.pytorch_utils import Conv1D

from ..runs.durable import write_tensors

_VALUES = "values"
_numbers = itertools.count()


@dataclass(frozen=True, eq=False)
class Stored:
    """Where the values of a placeholder lie.

    Args:
        path: Of the parameter in its model.
        source: Holds them by name; reading an entry brings it into memory.
        name: Of the entry.
        shape: Of the entry, as the model has a place for it.
        device: Where they are needed.
        folder: Where values that replace these are written; they stay in memory without one.
        cuts: `(dimension, index)` of what is left of the values, one cut after the other.
    """

    path: str
    source: Mapping[str, torch.Tensor]
    name: str
    shape: torch.Size
    device: torch.device
    folder: Path | None = None
    cuts: tuple[tuple[int, torch.Tensor], ...] = ()

    def read(self) -> torch.Tensor:
        """The values, on `device`.

        Raises:
            OSError: they cannot be read, or are others than the model has a place for.
        """
        try:
            with _disable_current_modes():  # what counts or widens the model's operations is not meant for these
                values = self.source[self.name]
        except (OSError, SafetensorError) as error:
            raise OSError(
                f"{self.path} cannot be read from the checkpoint any more: {error}. Put the file back as it was."
            ) from error
        if values.shape != self.shape:
            raise OSError(
                f"{self.path} has shape {tuple(values.shape)} in the checkpoint, and {tuple(self.shape)} by its "
                "config: put back the config.json that was saved with these weights."
            )
        for dim, index in self.cuts:
            values = values.index_select(dim, index.to(values.device))
        return values.to(self.device)


class _File(Mapping[str, torch.Tensor]):
    """One tensor in a file, removed with the last placeholder that refers to it."""

    def __init__(self, path: Path):
        self.path = path
        weakref.finalize(self, path.unlink, missing_ok=True)

    def __getitem__(self, name: str) -> torch.Tensor:
        with safe_open(self.path, framework="pt") as file:
            return file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter([_VALUES])

    def __len__(self) -> int:
        return 1


def stored(tensor: torch.Tensor) -> Stored | None:
    """Where the values of a placeholder lie; `None` for an ordinary tensor."""
    return getattr(tensor, "_stored", None)


def values(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or the values of a placeholder, read now."""
    where = stored(tensor)
    return tensor if where is None else where.read()


def device_of(tensor: torch.Tensor) -> torch.device:
    """Where the tensor is, or the values of a placeholder are when they are read."""
    where = stored(tensor)
    return tensor.device if where is None else where.device


def cut(tensor: torch.Tensor, dim: int, index: torch.Tensor) -> torch.Tensor:
    """`tensor.index_select(dim, index)`; of a placeholder a placeholder, for which nothing is read."""
    where = stored(tensor)
    smaller = tensor.detach().index_select(dim, index.to(tensor.device))
    if where is None:
        return smaller
    return _placeholder(smaller, replace(where, cuts=(*where.cuts, (dim, index))))


def put_away(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """New values for a placeholder, kept where its own are to be kept; the tensor itself for ordinary ones."""
    where = stored(like)
    if where is None or stored(tensor) is not None:
        return tensor
    source: Mapping[str, torch.Tensor] = {_VALUES: tensor.detach().cpu()}
    if where.folder is not None:
        path = where.folder / f"{next(_numbers)}.safetensors"
        write_tensors(path, dict(source))
        source = _File(path)
    return _placeholder(tensor.to("meta"), replace(where, source=source, name=_VALUES, shape=tensor.shape, cuts=()))


def _placeholder(empty: torch.Tensor, where: Stored) -> torch.Tensor:
    empty.__dict__["_stored"] = where
    return empty


@contextmanager
def loaded(*modules: nn.Module) -> Iterator[None]:
    """The weights of modules are in memory for the time being; nothing may be shrunk meanwhile."""
    swapped = [(inside, name, p) for m in modules for inside in m.modules() for name, p in _placeholders(inside)]
    with ExitStack() as stack:
        for module, name, placeholder in swapped:
            if module._parameters[name] is placeholder:  # it may be part of two of the modules
                _load(module, name)
                stack.callback(module._parameters.__setitem__, name, placeholder)
        yield


@contextmanager
def reading(model: nn.Module) -> Iterator[None]:
    """Within the context, each module of a model reads the placeholders that it holds when it runs."""
    with ExitStack() as stack:
        for module in model.modules():
            if _placeholders(module):
                _hook(module, [module], stack)
        yield


@contextmanager
def taken_over(
    modules: Mapping[str, nn.Module], ties: Mapping[str, str], folder: Path | None = None
) -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """Weights that accelerate keeps elsewhere are placeholders for the time being; then they are accelerate's again.

    The model can be shrunk inside; what comes back is dispatched as before, with the weights that it has then.

    Args:
        modules: Of a model, under each of their names; one with all of its weights in memory is left alone.
        ties: By name of a parameter of it, the parameter that it is one with (`all_tied_weights_keys`).
        folder: Where new weights are written; they stay in memory without one.

    Yields:
        What makes a context within which the weights are accelerate's, as they are then, to hand the model over.
    """
    paths: dict[nn.Module, str] = {}
    for path, module in modules.items():
        paths.setdefault(module, path)
    hooks = [(module, hook) for module in paths for hook in _offloading(vars(module).get("_hf_hook"))]
    if not hooks:
        yield nullcontext
        return
    held: list[_Held] = []
    with ExitStack() as stack:
        known: dict[int, nn.Parameter] = {}
        for module, hook in hooks:
            for owner, name, key in _tensors(module, hook):
                path, device = f"{paths[module]}.{key}".lstrip("."), torch.device(hook.execution_device)
                before: Any = owner._parameters[name]
                where = Stored(path, hook.weights_map, key, before.shape, device, folder)
                if id(before) not in known:
                    known[id(before)] = _taken(before, where, elsewhere=_is_large(owner, before))
                owner._parameters[name] = known[id(before)]
                held.append(_Held(hook, owner, name, known[id(before)], where))
            hook.offload = False
            _hook(module, list({id(o): o for o, _, _ in _tensors(module, hook)}.values()), stack)
        _tie(modules, ties)
        try:
            yield partial(_lent, [hook for _, hook in hooks], held)
        finally:
            _give_back([hook for _, hook in hooks], held)


@dataclass(frozen=True, eq=False)
class _Held:
    """A parameter that is taken over: who read it, its owner and name, and what stands in for it until it is cut."""

    hook: AlignDevicesHook
    owner: nn.Module
    name: str
    given: nn.Parameter
    where: Stored


@contextmanager
def _lent(hooks: list[AlignDevicesHook], held: list[_Held]) -> Iterator[None]:
    """Weights are accelerate's inside, and the very placeholders that they were on exit."""
    placeholders = [one.owner._parameters[one.name] for one in held]
    maps = [hook.weights_map for hook in hooks]
    _give_back(hooks, held)
    try:
        yield
    finally:
        for one, placeholder in zip(held, placeholders, strict=True):
            one.owner._parameters[one.name] = placeholder
        for hook, weights in zip(hooks, maps, strict=True):
            hook.weights_map, hook.offload = weights, False


def _give_back(hooks: list[AlignDevicesHook], held: list[_Held]) -> None:
    entries: dict[int, dict[str, Stored]] = {id(hook): {} for hook in hooks}
    for one in held:
        now: Any = one.owner._parameters[one.name]
        own = stored(now)
        if own is None:
            own = one.where
            if now is not one.given:
                own = replace(own, source={_VALUES: now.detach()}, name=_VALUES, shape=now.shape)
        one.owner._parameters[one.name] = nn.Parameter(now.detach().to("meta"), requires_grad=now.requires_grad)
        entries[id(one.hook)][one.where.name] = own
    for hook in hooks:
        hook.weights_map = _Weights(entries[id(hook)], hook.weights_map)
        hook.offload = True


class _Weights(Mapping[str, torch.Tensor]):
    """What accelerate reads a module's weights from, once the module was shrunk."""

    def __init__(self, entries: dict[str, Stored], others: Mapping[str, torch.Tensor]):
        self.entries, self.others = entries, others

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.entries[name].read() if name in self.entries else self.others[name]

    def __iter__(self) -> Iterator[str]:
        return iter({**self.entries, **dict.fromkeys(self.others)})

    def __len__(self) -> int:
        return len(list(iter(self)))


def without_values(modules: Mapping[str, nn.Module]) -> list[str]:
    """Names of parameters on the meta device that no hook of accelerate reads from elsewhere, of a model's modules."""
    read = {
        (id(owner), name)
        for module in modules.values()
        for hook in _offloading(vars(module).get("_hf_hook"))
        for owner, name, _ in _tensors(module, hook)
    }
    return [
        f"{path}.{name}" if path else name
        for path, module in modules.items()
        for name, p in module._parameters.items()
        if p is not None and p.is_meta and stored(p) is None and (id(module), name) not in read
    ]


def _offloading(hook: Any) -> list[AlignDevicesHook]:
    """Those of a module's hook of accelerate, or of the several that it is made of, that read weights."""
    found = hook.hooks if isinstance(hook, SequentialHook) else [hook]
    return [one for one in found if isinstance(one, AlignDevicesHook) and one.offload]


def _tensors(module: nn.Module, hook: AlignDevicesHook) -> list[tuple[nn.Module, str, str]]:
    """Owner, name, and name in the hook's map, of every parameter that the hook reads."""
    owners = module.named_modules() if hook.place_submodules else [("", module)]
    return [
        (owner, name, f"{path}.{name}" if path else name)
        for path, owner in owners
        for name, parameter in owner._parameters.items()
        if parameter is not None
    ]


def _is_large(owner: nn.Module, parameter: nn.Parameter) -> bool:
    """Weights of linears; all else in a layer, but for experts stacked in one tensor, is small next to them."""
    return parameter.ndim >= 2 and isinstance(owner, (nn.Linear, Conv1D))


def _taken(before: nn.Parameter, where: Stored, elsewhere: bool) -> nn.Parameter:
    if elsewhere:
        return _placeholder(nn.Parameter(before.detach(), requires_grad=before.requires_grad), where)  # type: ignore
    held = where.read()
    # A view into a mapped file keeps the pages around it in memory, for each of a layer's vectors.
    return nn.Parameter(held.clone() if held.ndim < 2 else held, requires_grad=before.requires_grad)


def _tie(modules: Mapping[str, nn.Module], ties: Mapping[str, str]) -> None:
    """Weights that are one in memory are one again: each hook of accelerate has its own copy on meta."""
    for target, source in ties.items():
        owner, _, name = target.rpartition(".")
        other, _, other_name = source.rpartition(".")
        modules[owner]._parameters[name] = modules[other]._parameters[other_name]


def _placeholders(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in module._parameters.items() if p is not None and stored(p) is not None]


def _load(module: nn.Module, name: str) -> None:
    placeholder: Any = module._parameters[name]
    module._parameters[name] = nn.Parameter(values(placeholder), requires_grad=placeholder.requires_grad)


def _hook(module: nn.Module, owners: list[nn.Module], stack: ExitStack) -> None:
    """Have the parameters of `owners` read before `module` runs, and dropped behind."""
    waiting: list[ExitStack] = []

    def read(*_: Any) -> None:
        waiting.append(ExitStack())
        for owner in owners:
            for name, placeholder in _placeholders(owner):
                _load(owner, name)
                waiting[-1].callback(owner._parameters.__setitem__, name, placeholder)

    def drop(*_: Any) -> None:
        waiting.pop().close()

    stack.callback(module.register_forward_pre_hook(read, prepend=True).remove)
    stack.callback(module.register_forward_hook(drop, always_call=True).remove)
