"""Confidence intervals of figures that are ratios of sums over samples."""

import math

import torch

Interval = tuple[float, float]
"""`(low, high)`, 95%."""

_NORMAL = 1.959964


def ratio_interval(parts: torch.Tensor, wholes: torch.Tensor) -> Interval | None:
    """Of `sum(parts) / sum(wholes)`, to first order in the deviations of samples, by Student's t.

    Args:
        parts: `(samples,)` float64.
        wholes: `(samples,)` float64, not negative.

    Returns:
        The interval, or `None` of fewer than two samples.
    """
    count, total = len(parts), float(wholes.sum())
    if count < 2 or total <= 0:
        return None
    ratio = float(parts.sum()) / total
    deviation = math.sqrt(float((parts - ratio * wholes).square().sum()) * count / (count - 1)) / total
    reach = _student(count - 1) * deviation
    return ratio - reach, ratio + reach


def _student(freedom: int) -> float:
    """The 97.5% quantile of Student's t: exact for one and two degrees of freedom, else its expansion in `1 / v`.

    Abramowitz and Stegun, 26.7.5; within 0.2% from three degrees on.
    """
    if freedom < 3:
        return (12.7062, 4.3027)[freedom - 1]
    z = _NORMAL
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom ** (power + 1) for power, term in enumerate(terms))
