"""Decode the units of one consumer from vector-Jacobian products of its input columns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from .tracing import Source

NO_UNIT = -1
"""Owner of an entry that no column of the consumer depends on."""
SHARED = -2
"""Owner of an entry that feeds columns of several units: it stays when units go."""


@dataclass(frozen=True, eq=False)
class Line:
    """The entries of a source along one of its axes: the rows of a producer, the heads of a bias table, ..."""

    source: Source
    axis: int

    @property
    def length(self) -> int:
        """Number of entries."""
        return self.source.tensor.shape[self.axis]


class Units(NamedTuple):
    """How a consumer's columns fall into units.

    Args:
        columns: `(units, c)` int64.
        owner: `(entries,)` int64, the unit that owns each entry of the sources, or `NO_UNIT` or `SHARED`.
        heads: Where a unit is made of several heads that share entries: the heads as units, unit by unit.
    """

    columns: torch.Tensor
    owner: torch.Tensor
    heads: Units | None = None


class Jacobian:
    """Which entries of the sources a set of the consumer's input columns depends on.

    Args:
        tensor: `(..., n)` what the consumer reads, with its graph.
        sources: Leaves of that graph to follow.
    """

    def __init__(self, tensor: torch.Tensor, sources: list[Source]) -> None:
        self.tensor = tensor
        self.columns = tensor.shape[-1]
        self.sources = sources
        self.lines = [
            Line(source, axis)
            for source in sources
            for axis in (range(source.tensor.ndim) if source.axis is None else [source.axis % source.tensor.ndim])
        ]
        # The bias of a norm of keys moves all scores of a query alike: its gradient vanishes, or nearly so, at random.
        numbers = {(line.source.name, line.length): i for i, line in enumerate(self.lines) if line.source.axis is None}
        scales = [(f"{line.source.name.removesuffix('.bias')}.weight", line.length) for line in self.lines]
        self._told_by = [numbers.get(scale, i) for i, scale in enumerate(scales)]
        random = torch.Generator().manual_seed(1)
        # Random, so that no two paths cancel.
        self._cotangent = (torch.rand(tensor.shape, generator=random) + 0.5).to(tensor.device, tensor.dtype)

    def touched(self, columns: torch.Tensor) -> torch.Tensor:
        """Entries that the columns depend on, by one vector-Jacobian product.

        Args:
            columns: `(n,)` bool.

        Returns:
            `(entries,)` bool, over all `lines` one after another.
        """
        return self._entries(self._cotangent * columns.to(self._cotangent.device))

    def mixes_positions(self) -> bool:
        """Whether one position of the input depends on other positions of a linear's output, as in attention."""
        last = torch.zeros_like(self._cotangent)
        last.view(-1, self.columns)[-1] = 1
        for source, gradient in zip(self.sources, self._products(last), strict=True):
            if gradient is not None and source.axis is not None:
                positions = (gradient != 0).movedim(source.axis, -1).flatten(0, -2).any(-1)
                if int(positions.sum()) > 1:
                    return True
        return False

    def split(self, entries: torch.Tensor) -> list[torch.Tensor]:
        """Cut a vector over all entries, `(..., entries)`, into one per line."""
        return list(entries.split([line.length for line in self.lines], -1))

    def _products(self, cotangent: torch.Tensor) -> list[torch.Tensor | None]:
        leaves = [source.tensor for source in self.sources]
        return list(torch.autograd.grad(self.tensor, leaves, cotangent, retain_graph=True, allow_unused=True))

    def _entries(self, cotangent: torch.Tensor) -> torch.Tensor:
        gradients = self._products(cotangent)
        of_source = {id(source): gradient for source, gradient in zip(self.sources, gradients, strict=True)}
        touched = []
        for line in self.lines:
            gradient = of_source[id(line.source)]
            if gradient is None:
                touched.append(torch.zeros(line.length, dtype=torch.bool))
            else:
                touched.append((gradient != 0).movedim(line.axis, 0).reshape(line.length, -1).any(1).cpu())
        return torch.cat([touched[i] for i in self._told_by])


def decode(jacobian: Jacobian) -> Units | None:
    """Partition a consumer's columns into units, and say which unit owns each entry of its sources.

    An MLP's columns each depend on entries of their own: binary codes of the column numbers find the map in
    `2 log2(n)` products. Under attention, groups of adjacent columns (heads) share entries, and groups that share a
    part of their entries (query heads of one key/value head) belong to one unit.

    Args:
        jacobian: Of the consumer's input.

    Returns:
        The units; `None` when the columns do not fall into at least two equal units with entries of their own, or no
        unit can own a row of a linear.
    """
    if _all_rows_are_shared(jacobian):
        return None
    width = _group_width(jacobian)
    if width is None:
        return None
    if width == 1:
        columns = torch.arange(jacobian.columns).unsqueeze(1)
        units = Units(columns, _owner_by_codes(jacobian))
    else:
        found = _units_by_groups(jacobian, width)
        if found is None:
            return None
        units = found
    if len(units.columns) < 2 or not (units.owner >= 0).any():
        return None
    return units


def agrees(jacobian: Jacobian, units: Units, first: torch.Tensor) -> bool:
    """Whether units that were decoded elsewhere (in another layer) hold here too: three products.

    A random half of the units must touch exactly their own entries and the shared ones, and so must the other half.
    That tells any two maps of single columns apart; heads of another width differ in what the first column touches.

    Args:
        jacobian: Of the consumer's input here.
        units: As decoded there.
        first: `(entries,)` bool, what the first column touched there.
    """
    columns, owner, _ = units
    if not torch.equal(jacobian.touched(first_column(jacobian)), first):
        return False
    chosen = torch.rand(len(columns), generator=torch.Generator().manual_seed(2)) < 0.5
    chosen[0], chosen[-1] = True, False
    for half in (chosen, ~chosen):
        mask = torch.zeros(jacobian.columns, dtype=torch.bool)
        mask[columns[half].flatten()] = True
        expected = (owner == SHARED) | (owner >= 0) & half[owner.clamp(min=0)]
        if not torch.equal(jacobian.touched(mask), expected):
            return False
    return True


def first_column(jacobian: Jacobian) -> torch.Tensor:
    """`(n,)` bool, the first column alone."""
    return torch.arange(jacobian.columns) == 0


def _all_rows_are_shared(jacobian: Jacobian) -> bool:
    """Whether the first column alone depends on every row of linears that any column does, as behind a norm.

    That takes two products, and none with the embeddings, which what reads a residual stream depends on as well.
    """
    linears = [source for source in jacobian.sources if source.axis is not None]
    if not linears:
        return True
    rows = Jacobian(jacobian.tensor, linears)
    return torch.equal(rows.touched(first_column(rows)), rows.touched(torch.ones(rows.columns, dtype=torch.bool)))


def _group_width(jacobian: Jacobian) -> int | None:
    """Columns that belong together at the least: 1, or the width of a head."""
    n = jacobian.columns
    positions = torch.arange(n)
    first = jacobian.touched(first_column(jacobian))
    if not first.any():
        return None
    # Bisect, for all entries that column 0 touches at once, the last column that touches them too.
    low = torch.zeros(int(first.sum()), dtype=torch.long)
    high = torch.full_like(low, n - 1)
    middle = 1
    while True:
        touched = jacobian.touched(positions >= middle)[first]
        open_ = (low < middle) & (middle <= high)
        low[open_ & touched] = middle
        high[open_ & ~touched] = middle - 1
        unresolved = (low < high).nonzero()
        if not len(unresolved):
            break
        row = int(unresolved[0])
        middle = int(low[row] + high[row] + 1) // 2
    widths = [int(last) + 1 for last in high.unique() if n % (int(last) + 1) == 0 and 0 < int(last) < n - 1]
    return min(widths, default=1)


def _owner_by_codes(jacobian: Jacobian) -> torch.Tensor:
    """Owner of each entry when every column is a unit.

    Each bit of the column numbers is asked for and its complement as well: an entry that one column alone touches
    answers to exactly one of the two for every bit.
    """
    positions = torch.arange(jacobian.columns)
    entries = sum(line.length for line in jacobian.lines)
    owner = torch.zeros(entries, dtype=torch.long)
    reached, several = torch.zeros(2, entries, dtype=torch.bool)
    for bit in range((jacobian.columns - 1).bit_length()):
        chosen = (positions >> bit & 1).bool()
        one, zero = jacobian.touched(chosen), jacobian.touched(~chosen)
        owner += one.long() << bit
        several |= one & zero
        reached |= one | zero
    return owner.masked_fill(several, SHARED).masked_fill(~reached, NO_UNIT)


def _units_by_groups(jacobian: Jacobian, width: int) -> Units | None:
    """Units made of groups of `width` adjacent columns; `None` if units are unequal."""
    groups = jacobian.columns // width
    group_of = torch.arange(jacobian.columns) // width
    touched = torch.stack([jacobian.touched(group_of == group) for group in range(groups)])
    # Entries of all groups (the key and value rows of multi-query attention) tie nothing together: they stay.
    common = touched.all(0)
    unit = list(range(groups))
    for pattern in touched[:, ~common].unique(dim=1).T:
        members = pattern.nonzero().flatten().tolist()
        joined = {unit[member] for member in members}
        unit = [min(joined) if one in joined else one for one in unit]
    names = sorted(set(unit))
    unit_of_group = torch.tensor([names.index(one) for one in unit])
    counts = unit_of_group.bincount()
    if len(names) < 2 or (counts != counts[0]).any():
        return None
    columns = torch.stack([(unit_of_group[group_of] == one).nonzero().flatten() for one in range(len(names))])
    first_group = touched.float().argmax(0)
    owner = unit_of_group[first_group].masked_fill(common, SHARED).masked_fill(~touched.any(0), NO_UNIT)
    if counts[0] == 1:
        return Units(columns, owner)
    # The heads of a unit one after the other, wherever they are.
    order = unit_of_group.argsort(stable=True)
    several = touched.sum(0) > 1
    owner_head = order.argsort()[first_group].masked_fill(several, SHARED).masked_fill(~touched.any(0), NO_UNIT)
    heads = torch.arange(jacobian.columns).view(groups, width)[order]
    return Units(columns, owner, Units(heads, owner_head))
