"""Second moments of one block: of the two folds that are fitted on, and of what is held out."""

from dataclasses import dataclass

import torch
from accelerate.utils import send_to_device

from ..solver.moments import MomentAccumulator, Moments, unseen
from ..solver.reweighting import relative_error, relative_error_of_rows

FOLDS = 2
"""Parts of the calibration batches whose moments are kept apart."""

# Sums over more inputs than this are in float32, in half the memory: products of a thousand rows, which are no more
# exact than that, are added to them.
_DOUBLE_UP_TO = 1024


@dataclass(frozen=True)
class BlockMoments:
    """Sums of second moments of one block.

    Args:
        folds: Of the calibration batches, split by the parity of their index; one if there is one batch.
        held_out: Of the held-out batches.
    """

    folds: tuple[MomentAccumulator, ...]
    held_out: MomentAccumulator

    @property
    def rows(self) -> int:
        """Rows of the calibration batches."""
        return sum(fold.rows for fold in self.folds)

    @property
    def device(self) -> torch.device:
        """Where the sums of the folds are; what is held out is on the CPU if it found no room there."""
        return self.folds[0].device

    def to(self, device: torch.device | str) -> "BlockMoments":
        """The same sums on a device."""
        return BlockMoments(tuple(fold.to(device) for fold in self.folds), self.held_out.to(device))

    def of_folds(self, W: torch.Tensor, *, last: bool = False) -> list[Moments]:
        """The moments of each fold; a fold that sends no token to an expert knows nothing but its weights.

        Args:
            W: `(n, m)`, the consumer's weight, inputs by outputs.
            last: Whether this is asked for once only: the sums turn into the moments, in the same memory.
        """
        # Of a single row, centred moments are zero.
        seen = [fold.moments(W, last=last) for fold in self.folds if fold.rows > fold.intercept]
        if missing := len(self.folds) - len(seen):
            seen += [unseen(W, seen, self.held_out.intercept)] * missing
        return seen

    def held_out_error(
        self, W: torch.Tensor, columns: torch.Tensor, V: torch.Tensor, shift: torch.Tensor
    ) -> float | None:
        """The relative error on the held-out rows; `None` for an expert that gets none of them.

        Args:
            W: `(n, m)`, the consumer's weight, inputs by outputs.
            columns: `(k,)` int64, the columns kept.
            V: `(k, m)`, their new weights.
            shift: `(m,)`, the change of the bias.
        """
        held_out = self.held_out
        if held_out.rows <= held_out.intercept:
            return None
        columns, V, shift = send_to_device((columns, V, shift), held_out.device)
        if held_out.kept_rows is not None:
            return relative_error_of_rows(held_out.kept_rows, held_out.shift, W, columns, V, shift)
        return relative_error(held_out.moments(W, torch.float32), columns, V, shift)  # reported, in a few digits


def dtype_of_sums(n: int) -> torch.dtype:
    """Of the second moments of so many inputs."""
    return torch.float64 if n <= _DOUBLE_UP_TO else torch.float32


def accumulator(n: int, m: int | None, intercept: bool, device: torch.device, keep_rows: bool) -> MomentAccumulator:
    """Of the moments of so many inputs, and of as many targets, if they are summed."""
    return MomentAccumulator(n, m, intercept=intercept, dtype=dtype_of_sums(n), device=device, keep_rows=keep_rows)
