"""What every test process starts with.

One thread: there are as many processes as cores, and threads without a core stall the others. Tables of one width,
whatever the terminal's.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("COLUMNS", "120")

import pytest

from hf_subprune.allocation import survey as calibrated
from hf_subprune.allocation import targets


@pytest.fixture
def clock(monkeypatch):
    """Seconds of a forward, which depend on nothing but a model's parameters: in place of those measured."""

    def seconds(model, *_):
        return 1e-6 * model.num_parameters()

    def in_turn(model, batch, changed, min_run_time):
        outside = seconds(model)
        with changed():
            return outside, seconds(model)

    monkeypatch.setattr(targets, "measure_latency", seconds)
    for module in (targets, calibrated):
        monkeypatch.setattr(module, "times_in_turn", in_turn)
    return seconds
