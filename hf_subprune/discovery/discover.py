"""Find the prunable blocks of a model by what depends on what, not by what modules are called."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import nn

from ..blocks import Block, Discovery, Refusal, counted_once, parameters_per_unit
from ..data.probe import is_divisible
from ..models.forms import all_running, apart
from ..models.intact import intact
from ..models.offload import device_of
from ..models.paths import Modules, layer_of
from ..models.running import encoder_of, first_line, hooked, inside, said_again, undisturbed
from ..runs.memory import is_of_the_machine
from ..surgery.verification import EquivalenceError, verify
from .arguments import Call
from .probe_inputs import probe_inputs
from .refusals import (
    LEFT_WHOLE,
    functional_products,
    grouped_convolutions,
    refuse_stacks,
    unreached_modules,
    unread_modules,
    whole_stacks,
)
from .removal import with_removal
from .seeker import Seeker
from .settling import Trials, settle
from .ties import tie_shared
from .tracing import OUTPUT, linears_in, traced


def discover(model: nn.Module, inputs: Mapping[str, Any] | None = None) -> Discovery:
    """Find every block that can be shrunk exactly, and say why others cannot.

    One forward with every linear's output cut and replaced by a fresh leaf isolates the blocks; vector-Jacobian
    products of each consumer's input columns then give the producer rows that feed them. What is found is shrunk, by
    a different number of units in each layer, and compared with the original under masks: only blocks that pass are
    returned. The model is left exactly as it was.

    Args:
        model: Any model whose blocks are made of `nn.Linear`, `Conv1D` or convolutions; in memory, not on meta.
        inputs: Keyword arguments of a small forward (two samples, a few tokens); `probe_inputs(model)` if omitted.

    Experts that are stacked in one tensor are found one by one. Their blocks, and those of `nn.MultiheadAttention`,
    can be shrunk inside of `forms.apart` only.

    Returns:
        Blocks in the order of the forward, and refusals.

    Raises:
        ValueError: the model is on meta, or no inputs can be made for it that its forward accepts.
    """
    if any(device_of(parameter).type == "meta" for parameter in model.parameters()):
        raise ValueError("The model is on the meta device: load its weights before looking for blocks.")
    if inputs is None:
        inputs = _own_inputs(model)
    return intact(model, lambda: _apart(model, inputs))


def _apart(model: nn.Module, inputs: Mapping[str, Any]) -> Discovery:
    with apart(inside(model)), all_running(inside(model)):
        return _discover(model, inputs)


def _discover(model: nn.Module, inputs: Mapping[str, Any]) -> Discovery:
    modules = dict(model.named_modules())
    parameters = dict(model.named_parameters(remove_duplicate=False))
    trials = _trials(model, modules, inputs)
    ran = called(model, _compared(inputs))
    with traced(model, inputs) as trace:
        seek = Seeker(modules, parameters, trace)
        found, refusals = seek.candidates(ran)
    readers = {source.name: source.readers for sources in trace.sources for source in sources}
    found, unequal = tie_shared(parameters, _named(modules, found), readers)
    found, clashes = _without_clashes(found)
    found = _with_exact_queries(trials, found)
    blocks, inexact = settle(trials, found)
    failed = {block.name for block, _ in inexact if block.tie is not None}
    if failed:
        # What all layers share stays whole, and each cuts what it is given of it.
        found = [_without_shared(parameters, block) if block.name in failed else block for block in found]
        blocks, inexact = settle(trials, found)
    refusals += [seek.refusal(block, reason) for block, reason in inexact]
    refusals += [Refusal(block.name, block.kind, reason, LEFT_WHOLE) for block, reason in unequal]
    reading = {read.reader for read in trace.reads}
    layers = {path: layer for path in modules if path and (layer := layer_of(modules, path)) is not None}
    refusals += functional_products(modules, layers, readers, blocks)
    refusals += grouped_convolutions(modules, layers, blocks)
    refusals += unread_modules(layers, reading - {OUTPUT} - readers.keys(), blocks)
    refusals += unreached_modules(modules, ran, reading, blocks)
    refusals += refuse_stacks(modules, layers, blocks)
    blocks, parts = whole_stacks(modules, blocks)
    whole = counted_once(parameters, blocks)
    return Discovery(with_removal(model, inputs, trials, whole), (*refusals, *clashes, *parts))


def _own_inputs(model: nn.Module) -> dict[str, torch.Tensor]:
    inputs = probe_inputs(model)
    try:
        with undisturbed(model), torch.no_grad():
            model(**inputs)
    except Exception as error:
        if is_of_the_machine(error):
            raise
        shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in inputs.items())
        raise ValueError(
            f"{type(model).__name__} cannot run on the probe batch made for it ({shapes}): {first_line(error)}. Pass "
            f"`inputs`, a small batch of your own."
        ) from error
    return inputs


def called(model: nn.Module, inputs: Mapping[str, Any]) -> set[str]:
    """Paths of the linears that a forward calls."""
    paths: set[str] = set()
    calls = [(path, lambda _, path=path: paths.add(path)) for path in linears_in(model)]
    with undisturbed(model), torch.no_grad(), hooked(model, inputs=calls):
        model(**inputs)
    return paths


def _trials(model: nn.Module, modules: Modules, inputs: Mapping[str, Any]) -> Trials:
    encoder, compared = encoder_of(model), _compared(inputs)
    encoded = cache(partial(_encoded, model, compared, encoder or ""))

    def failure(
        blocks: Sequence[Block], kept: Mapping[str, torch.Tensor], to_consumer: bool = False
    ) -> EquivalenceError | None:
        prove = partial(verify, model, blocks, kept, compared, to_consumer=to_consumer)
        if encoder is not None and not any(_meet(path, encoder) for path in _touched(blocks)) and encoded():
            # It says the same whatever becomes of the decoder: it need not run, unless something seems to be wrong.
            again = said_again(model.get_submodule(encoder), lambda: encoded()[0])
            with again, suppress(EquivalenceError):
                prove()
                return None
        try:
            prove()
        except EquivalenceError as error:
            return error
        return None

    def calls(path: str) -> list[Call]:
        found: list[Call] = []
        record = [(path, lambda args, kwargs: found.append((args, kwargs)))]
        with undisturbed(model), torch.no_grad(), hooked(model, arguments=record):
            model(**inputs)
        return found

    return Trials(modules, failure, calls)


def _compared(inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """What shrunk models are compared with masked ones on: of spectrograms one, which is half a minute as a rule."""
    if "input_features" not in inputs or not is_divisible(dict(inputs)):
        return inputs
    return {name: value[:1] for name, value in inputs.items()}


def _encoded(model: nn.Module, inputs: Mapping[str, Any], encoder: str) -> list[Any]:
    """What the encoder puts out in the only call of it; empty where there are several."""
    found: list[Any] = []
    with undisturbed(model), torch.no_grad(), hooked(model, outputs=[(encoder, found.append)]):
        model(**inputs)
    return found if len(found) == 1 else []


def _touched(blocks: Sequence[Block]) -> Iterator[str]:
    """Dotted paths of modules that are not the same without units of the blocks."""
    for block in blocks:
        yield block.consumer
        yield from (piece.tensor.rpartition(".")[0] for piece in block.slices)
        yield from (attribute.module for attribute in block.attributes)
        yield from (argument.module for argument in block.arguments)


def _meet(path: str, other: str) -> bool:
    return f"{path}.".startswith(f"{other}.") or not path or f"{other}.".startswith(f"{path}.")


def _named(modules: Modules, blocks: list[Block]) -> list[Block]:
    """Name each block after the module that holds it, with its kind where that module holds more than the block."""
    paths = [block.owner for block in blocks]
    names = []
    for block, path in zip(blocks, paths, strict=True):
        above = modules[path.rpartition(".")[0]]
        alone = not any(other is not block and other.consumer.startswith(f"{path}.") for other in blocks)
        layer = isinstance(above, (nn.ModuleList, nn.Sequential))
        names.append(path if path and alone and not layer else f"{path}.{block.kind}".lstrip("."))
    taken = Counter(names)
    return [
        replace(block, name=name if taken[name] == 1 else block.consumer)
        for block, name in zip(blocks, names, strict=True)
    ]


def _with_exact_queries(trials: Trials, blocks: list[Block]) -> list[Block]:
    """The blocks, with query heads as units where it is exact to remove these; their attributes are settled."""
    offered = [replace(block.queries, name=block.name) for block in blocks if block.queries and not block.tie]
    exact = {block.name: block for block in settle(trials, offered)[0] if block.tie is None}
    return [replace(block, queries=exact.get(block.name)) for block in blocks]


def _without_shared(parameters: Mapping[str, torch.Tensor], block: Block) -> Block:
    slices = [piece for piece in block.slices if not piece.shared]
    return replace(block, tie=None, slices=tuple(slices), parameters_per_unit=parameters_per_unit(parameters, slices))


def _without_clashes(blocks: list[Block]) -> tuple[list[Block], list[Refusal]]:
    """Leave out blocks that would slice a tensor along a dimension that an earlier block slices."""
    taken: dict[tuple[str, int], str] = {}
    kept, refusals = [], []
    for block in blocks:
        clash = next((piece for piece in block.slices if (piece.tensor, piece.dim) in taken), None)
        if clash is None:
            kept.append(block)
            taken.update({(piece.tensor, piece.dim): block.name for piece in block.slices})
        else:
            reason = f"rows of {clash.tensor!r} belong to {taken[clash.tensor, clash.dim]!r} as well"
            refusals.append(
                Refusal(block.name, block.kind, reason, "Prune one of the two blocks, then discover again.")
            )
    return kept, refusals
