"""A crash or a hang costs one item."""

import os
import time

import pytest

from hf_subprune.coverage.isolation import isolated


def lost(item, reason):
    return reason


@pytest.mark.slow  # the first process imports everything
def test_a_crash_or_a_hang_costs_one_item_and_the_order_stays():
    assert list(isolated(abs, [-3, 2, -1], lost, seconds=300, workers=2)) == [3, 2, 1]
    assert list(isolated(os._exit, [3], lost, seconds=60, workers=1)) == ["its process ended with exit code 3"]
    start = time.monotonic()
    results = list(isolated(time.sleep, [600, 0], lost, seconds=10, workers=2))
    assert results == ["no result after 10 s", None]
    assert time.monotonic() - start < 60
