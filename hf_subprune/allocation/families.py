"""Blocks that get one width in common, because the config of the model has one number for all of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedModel

from ..blocks import Block, groups_of, place_of
from ..models.forms import together
from ..models.running import Batch, inside
from ..storage.layout import choose_layout, config_says
from ..surgery.edits import narrowed


@dataclass(frozen=True)
class Families:
    """How blocks are tied for one size.

    Args:
        names: Of the blocks of each family, in forward order; every block that may be pruned is in one.
        whole: Of the blocks that stay whole, since no number of the config says how wide they are.
        even: Whether the config says the width of each family; blocks have widths of their own otherwise.
        gone: Of the blocks that keep no unit, each in a family of its own.
        refused: Widths that the config cannot say all the same: name of a block, sets of its units, number of these.
    """

    names: tuple[tuple[str, ...], ...]
    whole: frozenset[str] = frozenset()
    even: bool = False
    gone: frozenset[str] = frozenset()
    refused: frozenset[tuple[str, int, int]] = frozenset()

    @classmethod
    def single(cls, blocks: Sequence[Block]) -> Families:
        """Each block with a width of its own, but for those that share their units or are stored together."""
        return cls(tuple(tuple(block.name for block in group.blocks) for group in groups_of(blocks)))

    def without(self, gone: Sequence[Block]) -> Families:
        """The families, of which some blocks keep no unit."""
        names = frozenset(block.name for block in gone)
        left = (tuple(name for name in family if name not in names) for family in self.names)
        return replace(self, names=(*filter(None, left), *((name,) for name in names)), gone=names)

    def leave_a_choice(self, blocks: Iterable[Block]) -> bool:
        """Whether what some blocks may cost in all says less than the width of each."""
        free = [family for family in self.of(blocks) if family[0].name not in self.gone | self.whole]
        return not self.even or len(free) > 1 or any(block.queries is not None for family in free for block in family)

    def let_blocks_go(self, budget: str) -> bool:
        """Whether a block may keep no unit: widths differ, by a budget that weighs what blocks lose."""
        return not self.even and budget == "global"

    def of(self, blocks: Iterable[Block]) -> list[list[Block]]:
        """Some of the blocks, family by family."""
        by_name = {block.name: block for block in blocks}
        found = ([by_name[name] for name in family if name in by_name] for family in self.names)
        return [family for family in found if family]


def loads_as_stock(model: PreTrainedModel, blocks: Sequence[Block], widths: Mapping[str, int], probe: Batch) -> bool:
    """Whether a model with these widths, by block name, is one that its config alone can describe."""
    try:
        prove_stock(model, blocks, widths, probe)
    except ValueError:
        return False
    return True


def prove_stock(model: PreTrainedModel, blocks: Sequence[Block], widths: Mapping[str, int], probe: Batch) -> None:
    """Raise `ValueError`, with the reason, unless a model with these widths is one that its config can describe."""
    with narrowed(model, blocks, widths), together(inside(model)):
        choose_layout(model, "stock", inputs=probe).undo()


def even_families(model: PreTrainedModel, blocks: Sequence[Block]) -> Families:
    """The families of a model whose widths its config is to say.

    Blocks at the same place of equal layers are one family, and those of several places are where the config has one
    number for them. Which it has is found by trial, by the shapes of tensors: each is narrowed for the time being.

    Args:
        model: In a `session`.
        blocks: That may be pruned.
    """
    places: dict[tuple[str, str, int], list[Block]] = {}
    for block in blocks:
        places.setdefault(place_of(block), []).append(block)
    said: list[list[Block]] = []
    unsaid: dict[tuple[str, int], list[list[Block]]] = {}
    for (_, kind, units), family in places.items():
        if _is_said(model, family):
            said.append(family)
        else:
            unsaid.setdefault((kind, units), []).append(family)
    whole: list[Block] = []
    for parts in unsaid.values():
        family = [block for block in blocks if any(block in part for part in parts)]
        if len(parts) > 1 and _is_said(model, family):
            said.append(family)
        else:
            whole += family
    names = [tuple(block.name for block in family) for family in said]
    names += [(block.name,) for block in whole]
    return Families(tuple(names), frozenset(block.name for block in whole), even=True)


def _is_said(model: PreTrainedModel, family: Sequence[Block]) -> bool:
    """Whether the config has a number for the width of all of the family, by the trial of one width."""
    width = narrow_width(family[0])
    if width == family[0].units:
        return False
    with narrowed(model, family, {block.name: width for block in family}), together(inside(model)):
        return config_says(model)


def narrow_width(block: Block) -> int:
    """Half of the units or fewer, for a trial: of heads, a number that divides theirs, as configs often want it."""
    divisors = (units for units in range(block.units // 2, 0, -1) if block.units % units == 0)
    return next(divisors, block.units)
