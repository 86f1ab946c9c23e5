"""What every test process starts with.

One thread: there are as many processes as cores, and threads without a core stall the others. Tables of one width,
whatever the terminal's.
"""

import collections
import functools
import multiprocessing
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("COLUMNS", "120")

import pytest

from hf_subprune import pruning
from hf_subprune.allocation import choice, survey, targets
from hf_subprune.evaluation import costs
from hf_subprune.report import page
from hf_subprune.storage import stock


@pytest.fixture(autouse=True)
def timed_briefly(monkeypatch):
    """Latencies that a report mentions are those of the fewest forwards: nothing here asks how exact they are."""
    monkeypatch.setattr(survey, "_REPORTED_SECONDS", 0.0)
    monkeypatch.setattr(pruning, "measure_latency", functools.partial(costs.measure_latency, min_run_time=0.01))


@pytest.fixture(autouse=True, scope="session")
def skeletons_are_built_once():
    """Those by which a config is searched for: as many as a hundred a model, of which only sizes are read."""
    build, known = stock.build_skeleton, collections.OrderedDict()

    def built(model_class, config):
        key = model_class, config._attn_implementation, config.to_json_string(use_diff=False)
        if key not in known:
            known[key] = build(model_class, config)
        known.move_to_end(key)
        if len(known) > 400:
            known.popitem(last=False)
        return known[key]

    stock.build_skeleton = built
    yield
    stock.build_skeleton = build


@pytest.fixture
def forkserver():
    """A context of processes that need not import anything, in place of those that do."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hf_subprune.bench.processes", "hf_subprune.coverage.survey"])
    return context


@pytest.fixture
def without_plots(monkeypatch):
    """Reports are saved without plots, which take longer to draw than a tiny model to prune."""
    monkeypatch.setattr(page, "find_spec", lambda _: None)


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
    for module in (targets, choice, survey):
        monkeypatch.setattr(module, "times_in_turn", in_turn)
    return seconds
