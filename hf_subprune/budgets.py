"""How many units each block keeps (ALGORITHM section 5). Numbers only: no model, no data."""

import math
from collections.abc import Sequence


def uniform_widths(units: Sequence[int], fraction: float, multiple: int = 1) -> list[int]:
    """The same kept fraction in every block, met from below.

    Args:
        units: Number of units of each block.
        fraction: Of the units to keep, in (0, 1]; 1 keeps everything, whatever the multiple.
        multiple: Widths are rounded down to a multiple of this many units.

    Returns:
        The number of units that each block keeps; 0 where the fraction is too small for a single multiple.
    """
    if fraction == 1:
        return list(units)
    exact = [math.floor(fraction * count + 1e-9) for count in units]
    return [width - width % multiple for width in exact]
