"""Blocks of a report in the families that they are shown in."""

import re
from collections.abc import Sequence

from .records import BlockReport, Record

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # a part of a dotted path


def pruned(report: Record) -> list[BlockReport]:
    """Blocks that lost units; the others have no error to show."""
    return [b for b in report.blocks if b.units_after < b.units_before]


def families(blocks: Sequence[BlockReport]) -> dict[str, list[BlockReport]]:
    """Blocks whose names differ by numbers only, in their order: the layers of one stack."""
    found: dict[str, list[BlockReport]] = {}
    for block in blocks:
        found.setdefault(_NUMBER.sub("*", block.name), []).append(block)
    return found


def numbers(blocks: Sequence[BlockReport]) -> list[str]:
    """What tells the blocks of a family apart."""
    return [".".join(_NUMBER.findall(block.name)) for block in blocks]


def spread(blocks: Sequence[BlockReport], count: int) -> list[BlockReport]:
    """At most `count` blocks at equal distances, the first and the last among them."""
    if len(blocks) <= count:
        return list(blocks)
    return [blocks[round(i * (len(blocks) - 1) / (count - 1))] for i in range(count)]
