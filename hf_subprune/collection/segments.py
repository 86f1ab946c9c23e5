"""Parts of a model that one forward calls once, in the order of the forward."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..blocks import Block


@dataclass(frozen=True)
class Segment:
    """A part of the model that one forward calls once.

    Args:
        path: Dotted path of the module; `""` is the model itself.
        blocks: The blocks inside, in the order in which the forward reaches their consumers.
        calls: How often one forward calls each of their consumers, in the same order (1 but for shared layers).
    """

    path: str
    blocks: tuple[Block, ...]
    calls: tuple[int, ...]

    @property
    def chain(self) -> str:
        """Path of the container that holds the segment; segments of one container follow one another."""
        return self.path.rpartition(".")[0]


@dataclass(frozen=True)
class Plan:
    """The segments in forward order.

    Args:
        segments: In the order in which the forward calls them.
        retain_all: Whether every segment's output must be kept (a later part reads it), not only each chain's last.
        leads: Modules that are not run again behind a segment, and the position of that segment.
        ends: Whether what is kept is all that is read behind the last segment, too.
    """

    segments: tuple[Segment, ...]
    retain_all: bool
    leads: Mapping[str, int] = field(default_factory=dict)
    ends: bool = False
