"""When gradual pruning removes how much. Numbers only."""

from dataclasses import asdict, dataclass
from typing import Any

SHAPES = {"cubic": 3, "linear": 1}
"""Exponent of each shape's remaining part, `(1 - i / steps) ** exponent`."""


@dataclass(frozen=True)
class Schedule:
    """Widths over training: all units before `start`, the target widths from `end` on.

    After pruning step `i` of `steps`, the fraction `1 - (1 - i / steps)^3` of the units to remove is gone: most go
    early, while there is training left to recover (Zhu & Gupta 2017, arXiv 1710.01878, eq. 1). `"linear"` removes
    equally many at each step.

    Args:
        shape: `"cubic"` or `"linear"`.
        start: Fraction of the training steps after which the first interval begins; the first pruning step comes at
            its end.
        end: Fraction of the training steps at which the last pruning step comes: early, so that the model has most of
            its training, and the higher learning rates of a decaying one, at its final size.
        steps: Number of pruning steps, equally spaced. Each costs one calibration.

    Raises:
        ValueError: the shape is unknown, or not `0 <= start < end < 1`, or there is no step.
    """

    shape: str = "cubic"
    start: float = 0.0
    end: float = 0.3
    steps: int = 8

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise ValueError(f"Schedule.shape takes one of {', '.join(map(repr, SHAPES))}; got {self.shape!r}.")
        if not 0 <= self.start < self.end < 1:
            raise ValueError(
                f"A schedule needs 0 <= start < end < 1, as fractions of the training steps; got start={self.start}, "
                f"end={self.end}."
            )
        if not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"Schedule.steps takes a whole number, 1 or more; got {self.steps!r}.")

    @classmethod
    def of(cls, value: Any) -> "Schedule":
        """The schedule of a shape's name or of a dict of fields; schedules are passed through."""
        if isinstance(value, cls):
            return value
        return cls(shape=value) if isinstance(value, str) else cls(**value)

    def to_dict(self) -> dict[str, Any]:
        """Every field as JSON holds it."""
        return asdict(self)

    def due(self, step: int, total: int) -> int:
        """Number of pruning steps to have been made when `step` of `total` optimizer steps are done."""
        passed = (step / total - self.start) / (self.end - self.start)
        return max(0, min(self.steps, int(passed * self.steps + 1e-9)))

    def removed(self, done: int) -> float:
        """Fraction, in [0, 1], of the units to remove that are gone after `done` pruning steps."""
        return 1 - (1 - done / self.steps) ** SHAPES[self.shape]
