"""Look for blocks in one trace of a model: from what depends on what to consumers, producers and units."""

from __future__ import annotations

import re
from collections.abc import Container, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..blocks import Block, Refusal, Slice, parameters_per_unit, some_of
from ..models.experts import stack_of
from ..models.linears import input_dim, is_convolution, is_linear, taps
from ..models.paths import Modules, layer_of
from ..models.running import first_line
from ..runs.memory import is_of_the_machine
from .refusals import LEFT_WHOLE, NO_ATTRIBUTE
from .tracing import OUTPUT, Read, Source, Trace
from .units import NO_UNIT, SHARED, Jacobian, Line, Units, agrees, decode, first_column

LOCAL = 64
"""A linear that reads more sources than this reads the residual stream: only sources of few readers are followed."""

FEW = 2
"""Readers that a producer of a block can have: the consumer, and one that reads other rows (a fused projection)."""


class _RefusedError(Exception):
    """Why a candidate is refused, before it has a name; and as what, where that is not the kind of its units."""

    def __init__(self, reason: str, kind: str | None = None) -> None:
        super().__init__(reason)
        self.kind = kind


class Seeker:
    """Looks for blocks in one trace; maps found in one layer are checked, not decoded again, in the next.

    Args:
        modules: Of the model that was traced.
        parameters: Of it, under each of their dotted paths.
        trace: What reads what.
    """

    def __init__(self, modules: Modules, parameters: Mapping[str, torch.Tensor], trace: Trace) -> None:
        self.modules = modules
        self.parameters = parameters
        self.trace = trace
        self.calls: dict[str, list[tuple[Read, list[Source]]]] = {}
        for read, sources in zip(trace.reads, trace.sources, strict=True):
            self.calls.setdefault(read.reader, []).append((read, sources))
        self._shared: dict[str, list[str]] = {}
        """By consumer, linears with rows that feed several of its units."""
        self._outside: dict[str, str] = {}
        """By consumer, why a producer is not shrunk with it."""
        self._presumed: dict[str, str] = {}
        """By consumer, the kind as which it is refused: units that share rows or mix positions may be of any."""
        self._maps: dict[tuple, tuple[Units, torch.Tensor]] = {}

    def candidates(self, ran: Container[str]) -> tuple[list[Block], list[Refusal]]:
        """All blocks, without attributes and named after their consumers, in the order of the forward; and refusals.

        Args:
            ran: Linears that the model's own forward calls: by the outputs that a trace puts in, a router may choose
                others.
        """
        blocks, refusals = [], []
        for consumer in self.calls:
            if consumer not in ran:
                continue
            try:
                candidate = self._candidate(consumer)
            except RuntimeError as error:
                if is_of_the_machine(error):
                    raise
                reason = f"what it reads cannot be differentiated: {first_line(error)}"
                candidate = Refusal(consumer, "unknown", reason, LEFT_WHOLE)
            if isinstance(candidate, Block):
                blocks.append(candidate)
            elif candidate is not None:
                refusals.append(candidate)
        return blocks, refusals

    def refusal(self, block: Block, reason: str) -> Refusal:
        """Of a block that was found here but does not shrink exactly, for a reason."""
        consumer = block.consumer
        if self._shared[consumer]:
            reason = f"its units share rows of {some_of(self._shared[consumer])}, and {reason}"
        elif consumer in self._outside:
            reason = f"{self._outside[consumer]}, and {reason}"
        return Refusal(block.name, self._presumed[consumer], reason, NO_ATTRIBUTE)

    def _candidate(self, consumer: str) -> Block | Refusal | None:
        """The block of a consumer, a refusal, or `None` for a linear that is no consumer of a block."""
        read, sources = self.calls[consumer][0]
        own = [source for source in sources if source.axis is not None and _few_readers(source)]
        if read.tensor.ndim < 2:
            return None
        residual = self._residual(consumer, sources)
        if residual is not None or not own:
            return residual
        jacobian = _local_jacobian(read, sources)
        decoded = self._decoded(jacobian)
        if decoded is None or not _owns_rows(jacobian, decoded.owner):
            elsewhere = any(source.readers != {consumer} for source in sources if source.axis is not None)
            if elsewhere or layer_of(self.modules, consumer) is None:
                return None
            names = ", ".join(repr(source.name) for source in own)
            reason = f"every input column depends on all rows of {names}: something between them spans the width"
            return Refusal(consumer, "unknown", reason, LEFT_WHOLE)
        features, owner = decoded.columns, decoded.owner
        kind = _kind(is_convolution(self.modules[consumer]), jacobian, features, owner)
        self._shared[consumer] = _shared(jacobian, owner)
        try:
            if self._is_outside(consumer) and kind != "channels":
                kind = "whole"
            mixer = kind == "mlp" and (bool(self._shared[consumer]) or jacobian.mixes_positions())
            self._presumed[consumer] = "unknown" if mixer else kind
            if kind == "attention" and features.shape[1] == 1:
                raise _RefusedError("attention of a single head, which has to stay", "whole")
            if not self._equal_at_every_call(consumer, features):
                raise _RefusedError("it is called several times, with units that are not the same each time")
            block = self._block(read, jacobian, decoded, kind)
            if features.shape[1] == 1 and _is_rearrangement(read.tensor):
                raise _RefusedError(
                    "nothing but a product of two linears: a low-rank pair, not a layer with units", "whole"
                )
            if kind != "channels":
                block = self._inside(block)
            _check_untied(self.parameters, block.slices)
        except _RefusedError as refused:
            return Refusal(consumer, refused.kind or self._presumed[consumer], str(refused), LEFT_WHOLE)
        if kind == "attention" and decoded.heads is not None:
            with suppress(_RefusedError):  # then whole groups are all there is
                queries = self._inside(self._block(read, jacobian, decoded.heads, kind))
                return replace(block, queries=replace(queries, sets=block.units))
        return block

    def _block(self, read: Read, jacobian: Jacobian, units: Units, kind: str) -> Block:
        """The block of these units, named after its consumer, without attributes."""
        consumer = read.reader
        module = self.modules[consumer]
        lines = _owned_lines(jacobian, units.owner)
        shared = _shared_parameters(self.trace, read, lines)
        slices = [Slice(f"{consumer}.weight", input_dim(module), units.columns)]
        for line, owners in lines:
            pieces = _slices(self.modules, line, owners, len(units.columns))
            slices.extend(replace(piece, shared=piece.tensor in shared) for piece in pieces)
        slices = _without_repeats(slices)
        return Block(
            stack=stack_of(self.modules, consumer),
            name=consumer,
            kind=kind,
            consumer=consumer,
            columns=(units.columns.unsqueeze(2) * taps(module) + torch.arange(taps(module))).flatten(1),
            slices=tuple(slices),
            attributes=(),
            parameters_per_unit=parameters_per_unit(self.parameters, slices),
        )

    def _inside(self, block: Block) -> Block:
        """The block within its layer: what producers outside of it make is an argument there, that can be cut."""
        layer = layer_of(self.modules, block.consumer)
        if layer is None:
            raise _RefusedError(
                "it is not in a repeated layer: heads and projectors are small, and other code reads their widths"
            )
        inside = tuple(piece for piece in block.slices if piece.shared or piece.tensor.startswith(f"{layer}."))
        outside = [piece.tensor for piece in block.slices if piece not in inside]
        if not outside:
            return block
        reason = f"its producer {outside[0]!r} lies outside of its layer {layer!r}"
        if not any(_is_row_of_linear(self.modules, piece) for piece in inside):
            raise _RefusedError(reason)
        self._outside[block.consumer] = reason
        return replace(block, slices=inside, parameters_per_unit=parameters_per_unit(self.parameters, inside))

    def _residual(self, consumer: str, sources: list[Source]) -> Refusal | None:
        """A refusal for a convolution whose channels are handed from layer to layer: several layers read them."""
        modules = self.modules
        if not is_convolution(modules[consumer]):
            return None
        made = [one for one in sources if one.axis is not None and is_convolution(modules[one.name])]
        readers = set().union(*(source.readers for source in made)) - {consumer}
        layers = {None if name == OUTPUT else layer_of(modules, name) for name in {one.name for one in made} | readers}
        if not readers or layers == {layer_of(modules, consumer)}:
            return None
        reason = (
            f"its channels are those of a residual stream: they come from {some_of([one.name for one in made])} and "
            f"also feed {some_of(readers)}"
        )
        return Refusal(consumer, "whole", reason, LEFT_WHOLE)

    def _is_outside(self, consumer: str) -> bool:
        """Whether a consumer is part of a head or a projector: in no list of layers, or in one of single linears."""
        layer = layer_of(self.modules, consumer)
        return layer is None or sum(map(is_linear, self.modules[layer].modules())) == 1

    def _decoded(self, jacobian: Jacobian) -> Units | None:
        key = (jacobian.columns, *((line.axis, line.length, line.source.axis) for line in jacobian.lines))
        known = self._maps.get(key)
        if known is not None and agrees(jacobian, *known):
            return known[0]
        decoded = decode(jacobian)
        if decoded is not None:
            self._maps[key] = (decoded, jacobian.touched(first_column(jacobian)))
        return decoded

    def _equal_at_every_call(self, consumer: str, columns: torch.Tensor) -> bool:
        if len(self.calls[consumer]) == 1:
            return True
        first: dict[tuple[str, int], list[int]] | None = None
        for read, sources in self.calls[consumer]:
            jacobian = _local_jacobian(read, sources)
            decoded = self._decoded(jacobian)
            if decoded is None or not torch.equal(decoded.columns, columns):
                return False
            owners = zip(jacobian.lines, jacobian.split(decoded.owner), strict=True)
            own = {(line.source.name, line.source.axis or line.axis): one.tolist() for line, one in owners}
            first = first or own
            if own != first:
                return False
        return True


def _kind(convolution: bool, jacobian: Jacobian, features: torch.Tensor, owner: torch.Tensor) -> str:
    """What the units are: heads own several rows of a producer, and with one head all units share queries and keys."""
    shared = bool(_shared(jacobian, owner))
    if features.shape[1] > 1:
        owners = zip(jacobian.lines, jacobian.split(owner), strict=True)
        rows = [int((own == 0).sum()) for line, own in owners if line.source.axis is not None]
        # A group of a grouped convolution owns fewer rows than the queries, keys and values of a head make together.
        group = convolution and sum(rows) < 3 * features.shape[1]
        return "channels" if group or max(rows) == 1 else "attention"
    if shared and jacobian.mixes_positions():
        return "attention"
    return "channels" if convolution else "mlp"


def _local_jacobian(read: Read, sources: list[Source]) -> Jacobian:
    return Jacobian(read.tensor, sources if len(sources) <= LOCAL else [one for one in sources if _few_readers(one)])


def _few_readers(source: Source) -> bool:
    return len(source.readers) <= FEW and OUTPUT not in source.readers


def _owns_rows(jacobian: Jacobian, owner: torch.Tensor) -> bool:
    """Whether a unit owns a row of any linear; the weights of a norm before the consumer do not make a block."""
    owners = zip(jacobian.lines, jacobian.split(owner), strict=True)
    return any(line.source.axis is not None and bool((one >= 0).any()) for line, one in owners)


def _shared(jacobian: Jacobian, owner: torch.Tensor) -> list[str]:
    """Linears with rows that feed several units."""
    owners = zip(jacobian.lines, jacobian.split(owner), strict=True)
    return [line.source.name for line, one in owners if line.source.axis is not None and bool((one == SHARED).any())]


def _owned_lines(jacobian: Jacobian, owner: torch.Tensor) -> list[tuple[Line, torch.Tensor]]:
    """Lines with entries that units own, with those owners: `(length,)` int64 each."""
    lines: dict[int, tuple[Line, torch.Tensor]] = {}
    for line, owners in zip(jacobian.lines, jacobian.split(owner), strict=True):
        if (owners >= 0).any():
            if id(line.source) in lines:
                raise _RefusedError(f"units own entries of {line.source.name!r} along two of its dimensions")
            lines[id(line.source)] = (line, owners)
    return list(lines.values())


def _shared_parameters(trace: Trace, read: Read, lines: list[tuple[Line, torch.Tensor]]) -> set[str]:
    """Parameters outside the linears with entries that units own and that other linears depend on too.

    Every row of a producer that a unit owns must feed this consumer only.
    """
    shared = set()
    for line, owners in lines:
        parameter = line.source.axis is None
        others = line.source.readers - {read.reader}
        if OUTPUT in others or (len(others) > FEW and not parameter):
            raise _RefusedError(
                f"it reads a residual stream: {line.source.name!r} also feeds {some_of(others)}", "whole"
            )
        for other in trace.reads:
            if other.reader in others and other.tensor.grad_fn is not None and line.source.name not in shared:
                elsewhere = Jacobian(other.tensor, [line.source])
                touched = elsewhere.touched(torch.ones(elsewhere.columns, dtype=torch.bool))
                rows = elsewhere.split(touched)[elsewhere.lines.index(_line(elsewhere, line))]
                if (rows & (owners >= 0)).any():
                    if not parameter:
                        # Two that read the same features read a stream of them, not units of their own.
                        same = other.tensor.shape == read.tensor.shape and torch.equal(other.tensor, read.tensor)
                        raise _RefusedError(
                            f"rows of {line.source.name!r} that its units own also feed {other.reader!r}",
                            "whole" if same else None,
                        )
                    shared.add(line.source.name)
    return shared


def _line(jacobian: Jacobian, line: Line) -> Line:
    return next(one for one in jacobian.lines if one.axis == line.axis)


REARRANGEMENT = re.compile(
    r"(View|UnsafeView|ReshapeAlias|Clone|Transpose|T|Permute|Expand|Slice|Squeeze|Unsqueeze|ToCopy|Mul|Div)Backward"
)
"""Names of autograd nodes that move or scale entries."""


def _is_rearrangement(tensor: torch.Tensor) -> bool:
    """Whether the tensor is a single leaf with its entries moved or scaled, with no activation between."""
    nodes: list[Any] = [tensor.grad_fn]
    leaves = 0
    while nodes:
        node = nodes.pop()
        if hasattr(node, "variable"):
            leaves += 1
        elif not REARRANGEMENT.match(type(node).__name__):
            return False
        nodes.extend(function for function, _ in node.next_functions if function is not None)
    return leaves == 1


def _slices(modules: Modules, line: Line, owners: torch.Tensor, units: int) -> list[Slice]:
    """Slices of the tensors behind one line: a producer's weight and bias, or the parameter itself."""
    owners = _filled(owners, units)
    counts = owners[owners >= 0].bincount(minlength=units)
    if (counts != counts[0]).any():
        raise _RefusedError(f"its units own different numbers of entries of {line.source.name!r}")
    # A stable sort puts owned entries last, unit by unit, each unit's in increasing order.
    index = owners.sort(stable=True).indices[-int(counts.sum()) :].view(units, -1)
    if line.source.axis is None:
        owner, _, name = line.source.name.rpartition(".")
        module = modules[owner]
        running = isinstance(module, nn.modules.batchnorm._BatchNorm) and name == "weight"
        names = [name, *(("running_mean", "running_var") if running and module.track_running_stats else ())]
        return [Slice(f"{owner}.{name}".lstrip("."), line.axis, index) for name in names]
    module = modules[line.source.name]
    slices = [Slice(f"{line.source.name}.weight", 1 - input_dim(module), index)]
    if module.bias is not None:
        slices.append(Slice(f"{line.source.name}.bias", 0, index))
    return slices


def _filled(owners: torch.Tensor, units: int) -> torch.Tensor:
    """Owners with the gaps filled where units own equal parts side by side.

    A batch may leave some entries without effect: points that are sampled outside of an image.
    """
    if len(owners) % units:
        return owners
    parts = torch.arange(units).repeat_interleave(len(owners) // units)
    return parts if bool(((owners == parts) | (owners == NO_UNIT)).all()) else owners


def _without_repeats(slices: list[Slice]) -> list[Slice]:
    """One slice for a producer that a layer calls twice (queries and positions through one projection)."""
    first: dict[tuple[str, int], Slice] = {}
    for piece in slices:
        known = first.setdefault((piece.tensor, piece.dim), piece)
        if not torch.equal(known.index, piece.index):
            raise _RefusedError(f"{piece.tensor!r} is used several times, with other rows for its units each time")
    return list(first.values())


def _is_row_of_linear(modules: Modules, piece: Slice) -> bool:
    module = modules[piece.tensor.rpartition(".")[0]]
    return piece.tensor.endswith(".weight") and is_linear(module) and piece.dim != input_dim(module)


def _check_untied(parameters: Mapping[str, torch.Tensor], slices: Sequence[Slice]) -> None:
    paths: dict[int, list[str]] = {}
    for name, parameter in parameters.items():
        paths.setdefault(id(parameter), []).append(name)
    for piece in slices:
        others = set(paths[id(parameters[piece.tensor])]) - {piece.tensor} if piece.tensor in parameters else set()
        if others:
            raise _RefusedError(f"{piece.tensor!r} is tied to {some_of(others)}")
