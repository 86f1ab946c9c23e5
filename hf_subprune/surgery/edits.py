"""Shrink a block in place, and undo it by reference."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from ..blocks import Block
from ..models.forwards import CUT_ARGUMENTS, INNER_WIDTH, adapted, kept_entries
from ..models.linears import as_matrix, as_weight
from ..models.offload import cut, device_of
from ..models.weights import caches, parameter_like, sizes
from .removal import never_run, why_it_stays

_ABSENT: Any = object()
"""What an entry is before it is made."""


@dataclass
class _Change:
    """One entry of one dictionary of a module (`_parameters`, `_buffers` or `__dict__`), before and after."""

    entries: dict[str, Any]
    name: str
    before: Any
    after: Any

    def put(self, value: Any) -> None:
        """Make the entry this one, whatever it is now."""
        if value is _ABSENT:
            self.entries.pop(self.name, None)
        else:
            self.entries[self.name] = value


class Edit(Protocol):
    """A change of one block, in place, that can be taken back and made again; `shrink` and `masking.mask` make them.

    Both take `(model, block, kept, weight, bias)`, so that one stands in for the other. Edits of one model are undone
    in the reverse of the order in which they were made, and made again in that order (`undo_all`, `taken_back`).

    Attributes:
        block: Name of the block.
        kept: `(k,)` int64, sorted: units of the block that were kept.
    """

    block: str
    kept: torch.Tensor

    def undo(self) -> None:
        """Put the block back as it was before, to the last bit."""

    def redo(self) -> None:
        """Change the block again, to the very same values."""


@dataclass
class ReplacingEdit:
    """An edit that replaces objects.

    `undo` and `redo` swap the original and the new parameter objects by reference: they cost a dictionary write per
    tensor, and after `undo` every parameter is the object that it was (optimizers and ties included).

    Args:
        block: As of `Edit`.
        kept: As of `Edit`.
    """

    block: str
    kept: torch.Tensor
    _changes: list[_Change] = field(default_factory=list, repr=False)

    def undo(self) -> None:
        """As `Edit`.

        Raises:
            RuntimeError: the edit is not in place, or a later edit of the same tensors still is.
        """
        self._swap([(change, change.after, change.before) for change in reversed(self._changes)], "undo")

    def redo(self) -> None:
        """As `Edit`, to the very tensors that were made the first time.

        Raises:
            RuntimeError: the edit is already in place, or the tensors were changed since.
        """
        self._swap([(change, change.before, change.after) for change in self._changes], "redo")

    def _swap(self, swaps: list[tuple[_Change, Any, Any]], action: str) -> None:
        for change, present, _ in swaps:
            if not _same(change.entries.get(change.name, _ABSENT), present):
                raise RuntimeError(
                    f"Cannot {action} the surgery of {self.block!r}: {change.name!r} is not the one that it left. "
                    f"Undo later edits first, in the reverse of the order in which they were made."
                )
        try:
            for change, _, wanted in swaps:
                change.put(wanted)
        except BaseException:  # an interrupt
            for change, present, _ in swaps:
                change.put(present)
            raise


def shrink(
    model: nn.Module,
    block: Block,
    kept: Sequence[int] | torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> Edit:
    """Remove every unit of `block` that is not in `kept`, in place.

    Parameters are replaced (dtype, device and `requires_grad` kept), modules stay, and sizes that modules remember
    (`in_features`, `nf`, `groups`, ...) and `block.attributes` follow. All new tensors are made before the first one
    is installed, so a failure leaves the model as it was.

    Args:
        model: The model that `block` was discovered in.
        block: What to shrink.
        kept: `(k,)` unit indices, strictly increasing; none removes a `removable` block: its `bypasses` are not run,
            all of its tensors are empty but for the consumer's bias, and that bias is all that it still gives.
        weight: `(k * c, m)` new consumer weight, inputs by outputs, where `c` is the columns per unit and the inputs
            are the kept columns in increasing order; cast to the consumer's dtype. The kept slice of the present
            weight when omitted.
        bias: `(m,)` new consumer bias; the present one when omitted.

    Returns:
        The edit, in place; `Edit.undo()` takes it back.

    Raises:
        ValueError: `kept` is unsorted, out of range, or empty where the block cannot go; `weight` or `bias` has the
            wrong shape, or the consumer has no bias; the model's tensors are not those that the block was discovered
            in.
    """
    units = checked_units(block, kept)
    edit = ReplacingEdit(block.name, units)
    tensors: dict[str, torch.Tensor] = {}
    for piece in block.slices:
        tensor = tensors.get(piece.tensor)
        if tensor is None:
            tensor = _get_tensor(model, block, piece.tensor)
        tensors[piece.tensor] = _without(tensor, piece.dim, piece.index, units, block, piece.tensor)
    if units.numel() == 0:
        tensors |= {path: cut(tensor, dim, units) for path, tensor, dim in never_run(model, block)}

    consumer = model.get_submodule(block.consumer)
    for name, values in (("weight", weight), ("bias", bias)):
        if values is not None:
            path = f"{block.consumer}.{name}"
            tensors[path] = _new_consumer_tensor(block, consumer, name, values, tensors.get(path))

    changes = edit._changes
    owners: dict[str, nn.Module] = {}
    for path, tensor in tensors.items():
        owner_path, _, name = path.rpartition(".")
        owner = owners[owner_path] = model.get_submodule(owner_path)
        is_parameter = name in owner._parameters
        entries: dict[str, Any] = owner._parameters if is_parameter else owner._buffers  # type: ignore[assignment]
        after = parameter_like(entries[name], tensor) if is_parameter else tensor
        changes.append(_Change(entries, name, entries[name], after))
    changes.extend(_attribute_changes(model, block, units.numel()))
    changes.extend(_forward_changes(model, block, units))
    for owner in owners.values():
        changes.extend(_Change(owner.__dict__, name, before, {}) for name, before in caches(vars(owner)))
    for change in changes:
        if not _same(change.entries.get(change.name, _ABSENT), change.before):
            raise ValueError(
                f"Block {block.name!r}: {change.name!r} was {change.before!r} when the block was discovered and is "
                f"{change.entries.get(change.name)!r} now. Discover the blocks of this model again."
            )
    return _installed(edit, owners.values())


def _installed(edit: ReplacingEdit, owners: Iterable[nn.Module] = ()) -> Edit:
    """Make the edit's changes, and those of the sizes that owners remember: all of them, or none."""
    try:
        for change in edit._changes:
            change.put(change.after)
        for owner in owners:
            for name, after in sizes(owner).items():
                if owner.__dict__[name] != after:
                    edit._changes.append(_Change(owner.__dict__, name, owner.__dict__[name], after))
                    owner.__dict__[name] = after
        return edit
    except BaseException:
        for change in reversed(edit._changes):
            change.put(change.before)
        raise


def assign(model: nn.Module, block: str, values: Mapping[str, torch.Tensor]) -> Edit:
    """Give parameters other values, in place.

    Args:
        model: The model.
        block: Name for the edit.
        values: By dotted path of a parameter, the values; cast to its dtype and device.

    Returns:
        The edit, in place; `Edit.undo()` takes it back.
    """
    edit = ReplacingEdit(block, torch.empty(0, dtype=torch.long))
    for path, value in values.items():
        owner, _, name = path.rpartition(".")
        entries: dict[str, Any] = model.get_submodule(owner)._parameters  # type: ignore[assignment]
        before = entries[name]
        after = parameter_like(before, value.detach().to(before).clone(memory_format=torch.contiguous_format))
        edit._changes.append(_Change(entries, name, before, after))
    return _installed(edit)


def kept_columns(block: Block, kept: Sequence[int] | torch.Tensor) -> torch.Tensor:
    """Columns of the consumer's input that the units in `kept` own, `(k * c,)` int64, sorted.

    Raises:
        ValueError: `kept` is unsorted, out of range, or empty where the block cannot go.
    """
    return block.columns[checked_units(block, kept)].flatten().sort().values


def _attribute_changes(model: nn.Module, block: Block, units: int) -> list[_Change]:
    """Attributes that follow the units; a module whose forward reads its config gets a copy of its own."""
    changes = []
    configs: dict[str, Any] = {}
    for attribute in block.attributes:
        owner = model.get_submodule(attribute.module)
        after = int(attribute.per_unit * units)
        if attribute.name.startswith("config."):
            name = attribute.name.removeprefix("config.")
            if attribute.module not in configs:
                configs[attribute.module] = copy.copy(owner.config)
                changes.append(_Change(owner.__dict__, "config", owner.config, configs[attribute.module]))
            setattr(configs[attribute.module], name, after)
        elif attribute.name != INNER_WIDTH:
            changes.append(_Change(owner.__dict__, attribute.name, attribute.before, after))
    return changes


def _forward_changes(model: nn.Module, block: Block, units: torch.Tensor) -> list[_Change]:
    """Forwards that follow an inner width or cut arguments, with what they read."""
    if units.numel() == 0:
        return _bypassing_changes(model, block)
    changes = []
    widths = {one.module: int(one.per_unit * units.numel()) for one in block.attributes if one.name == INNER_WIDTH}
    for path in dict.fromkeys([*widths, *(argument.module for argument in block.arguments)]):
        module = model.get_submodule(path)
        cut = dict(vars(module).get(CUT_ARGUMENTS, {}))
        for argument in block.arguments:
            if argument.module == path:
                name = kept_entries(argument.name)
                before = module._buffers.get(name, _ABSENT)
                own = argument.index[units].flatten().sort().values
                after = own.to(_device(module)) if before is _ABSENT else before[own.to(before.device)]
                changes.append(_Change(module._buffers, name, before, after))
                cut[argument.name] = (argument.dim, argument.entries)
        width = widths.get(path, vars(module).get(INNER_WIDTH))
        for name, after in adapted(module, width, cut).items():
            changes.append(_Change(vars(module), name, vars(module).get(name, _ABSENT), after))
    return changes


def _bypassing_changes(model: nn.Module, block: Block) -> list[_Change]:
    """Forwards that are not run where no unit is left; what they would have followed stays as it is."""
    changes = []
    for bypass in block.bypasses:
        module = model.get_submodule(bypass.module)
        for name, after in adapted(module, None, {}, (bypass.consumer, bypass.entries)).items():
            changes.append(_Change(vars(module), name, vars(module).get(name, _ABSENT), after))
    return changes


def _device(module: nn.Module) -> torch.device:
    return device_of(next(module.parameters()))


def checked_units(block: Block, kept: Sequence[int] | torch.Tensor) -> torch.Tensor:
    units = torch.as_tensor(kept, device="cpu")
    if units.shape == (0,):
        if not block.removable:
            raise ValueError(
                f"Block {block.name!r} must keep a unit, but `kept` is empty: {why_it_stays(block)}. Keep one."
            )
        return units.long()
    if units.ndim != 1 or units.is_floating_point() or units.dtype == torch.bool:
        raise ValueError(
            f"Block {block.name!r}: `kept` must be a list of unit indices, found a {tuple(units.shape)} tensor of "
            f"{units.dtype}."
        )
    units = units.long()
    if units[0] < 0 or units[-1] >= block.units or (units.diff() <= 0).any():
        raise ValueError(
            f"Block {block.name!r}: `kept` must be strictly increasing within 0..{block.units - 1}, "
            f"found {units.tolist()}."
        )
    counts = units.div(block.units // block.sets, rounding_mode="floor").bincount(minlength=block.sets)
    if (counts != counts[0]).any():
        raise ValueError(
            f"Block {block.name!r}: `kept` must hold equally many units of each of its {block.sets} sets, found "
            f"{counts.tolist()}."
        )
    return units


def _get_tensor(model: nn.Module, block: Block, path: str) -> torch.Tensor:
    owner_path, _, name = path.rpartition(".")
    try:
        owner = model.get_submodule(owner_path)
    except AttributeError as error:
        raise ValueError(
            f"Block {block.name!r}: the model has no module {owner_path!r}. Blocks of weights that are stored in one "
            "tensor are shrunk inside of `models.forms.apart(model.modules())`."
        ) from error
    tensor = owner._parameters.get(name, owner._buffers.get(name))
    if tensor is None:
        raise ValueError(f"Block {block.name!r}: the model has no parameter or buffer {path!r}.")
    return tensor


def _without(
    tensor: torch.Tensor, dim: int, index: torch.Tensor, units: torch.Tensor, block: Block, path: str
) -> torch.Tensor:
    """`tensor` without the entries along `dim` that removed units own; all others keep their order."""
    length = tensor.shape[dim]
    if index.numel() > length or int(index.max()) >= length:
        raise ValueError(
            f"Block {block.name!r}: {path!r} has {length} entries along dimension {dim}, the block was discovered "
            f"with at least {int(index.max()) + 1}. Discover the blocks of this model again."
        )
    stays = torch.ones(length, dtype=torch.bool)
    stays[index.flatten()] = False
    stays[index[units].flatten()] = True
    return cut(tensor, dim, stays.nonzero().flatten())


def _new_consumer_tensor(
    block: Block, consumer: nn.Module, name: str, values: torch.Tensor, sliced: torch.Tensor | None
) -> torch.Tensor:
    """The caller's `weight` or `bias` in the consumer's own layout, dtype and device."""
    present = sliced if sliced is not None else consumer._parameters.get(name)
    if present is None:
        raise ValueError(
            f"Block {block.name!r}: a new {name} was given, but the consumer {block.consumer!r} has none. Pass None."
        )
    expected = tuple(as_matrix(consumer, present).shape if name == "weight" else present.shape)
    if tuple(values.shape) != expected:
        raise ValueError(
            f"Block {block.name!r}: the new {name} of {block.consumer!r} must have shape {expected} (inputs by "
            f"outputs), found {tuple(values.shape)}."
        )
    values = values.detach().to(device=device_of(present), dtype=present.dtype)
    # A copy in any case: the caller keeps its tensor, the model its own.
    values = as_weight(consumer, values) if name == "weight" else values
    return values.clone(memory_format=torch.contiguous_format)


def _same(found: Any, expected: Any) -> bool:
    return found == expected if isinstance(expected, (int, tuple)) else found is expected


def undo_all(edits: Mapping[str, Edit]) -> None:
    """Undo edits, by block name in the order in which they were made: the last one first."""
    for edit in list(edits.values())[::-1]:
        edit.undo()


@contextmanager
def taken_back(edits: Mapping[str, Edit]) -> Iterator[None]:
    """The model as it was before the edits made until now, for the time being."""
    made = dict(edits)
    undo_all(made)
    try:
        yield
    finally:
        for edit in made.values():
            edit.redo()


@contextmanager
def narrowed(model: nn.Module, blocks: Sequence[Block], widths: Mapping[str, int]) -> Iterator[None]:
    """The model with the first units of each block, not reweighted, for the time being."""
    with ExitStack() as stack:
        for block in blocks:
            if widths[block.name] < block.units:
                stack.callback(shrink(model, block, block.first(widths[block.name])).undo)
        yield
