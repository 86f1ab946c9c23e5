"""What every test process starts with.

One thread: there are as many processes as cores, and threads without a core stall the others. Tables of one width,
whatever the terminal's.
"""

import functools
import multiprocessing
import os
from importlib import import_module

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("COLUMNS", "120")

import pytest
from forked import LIBRARIES, MODELS, SERVERS, forks

# The package is imported where it is needed: the process that hands tests out to others needs nothing of it, and some
# of the servers are forked off before.


def pytest_configure(config):
    """Servers are forked off a process that runs tests, before it imports Transformers and before the package."""
    if not config.getoption("numprocesses", None):
        for name, modules in {"torch": LIBRARIES, "transformers": MODELS}.items():
            for module in modules:
                import_module(module)
            SERVERS[name] = forks()


def pytest_collection_finish(session):
    """A server with all that tests import; what has been imported stays, garbage is not looked for in it."""
    if not session.config.getoption("numprocesses", None):
        SERVERS["hf_subprune"] = forks()


@pytest.fixture(autouse=True)
def timed_briefly(monkeypatch):
    """Latencies that a report mentions are those of the fewest forwards: nothing here asks how exact they are."""
    from hf_subprune import pruning
    from hf_subprune.allocation import survey
    from hf_subprune.evaluation import costs

    monkeypatch.setattr(survey, "_REPORTED_SECONDS", 0.0)
    monkeypatch.setattr(pruning, "measure_latency", functools.partial(costs.measure_latency, min_run_time=0.01))


@pytest.fixture
def forkserver():
    """A context of processes that need not import anything, in place of those that do."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hf_subprune.bench.processes", "hf_subprune.coverage.survey"])
    return context


@pytest.fixture
def without_plots(monkeypatch):
    """Reports are saved without plots, which take longer to draw than a tiny model to prune."""
    monkeypatch.setattr("hf_subprune.report.page.find_spec", lambda _: None)


@pytest.fixture
def clock(monkeypatch):
    """Seconds of a forward, which depend on nothing but a model's parameters: in place of those measured."""
    from hf_subprune.allocation import choice, survey, targets
    from hf_subprune.evaluation.costs import InTurn

    def seconds(model, *_):
        return 1e-6 * model.num_parameters()

    def in_turn(model, batch, changed, min_run_time):
        outside = seconds(model)
        with changed():
            inside = seconds(model)
        return InTurn(outside, inside, (inside / outside, inside / outside))

    monkeypatch.setattr(targets, "measure_latency", seconds)
    for module in (targets, choice, survey):
        monkeypatch.setattr(module, "times_in_turn", in_turn)
    return seconds


class Computed:
    """What workspaces compute, which is what they do not find.

    Attributes:
        names: In the order in which they were begun.
        before: Called with each of them; it may stop the run.
    """

    def __init__(self):
        self.names = []
        self.before = lambda name: None

    @staticmethod
    def of_blocks(names):
        """Those that are solutions of blocks."""
        return [name for name in names if name.startswith("blocks/")]

    @property
    def blocks(self):
        """Solutions of blocks among the names."""
        return self.of_blocks(self.names)

    def start_anew(self):
        """Stop no more; returns the names so far, of which none is kept."""
        names, self.names = self.names, []
        self.before = lambda name: None
        return names

    def noted(self, name, compute):
        def run():
            self.names.append(name)
            self.before(name)
            return compute()

        return run

    def stop_at_block(self, number, error):
        """Raise the error instead of solving that block, counted from 0."""

        def stop(name):
            if name.startswith("blocks/") and len(self.blocks) == number + 1:
                raise error

        self.before = stop


@pytest.fixture
def computed(monkeypatch):
    """What the runs of a test compute, and where they stop: a `Computed`."""
    from hf_subprune.runs.workspace import Workspace

    found, once, own = Computed(), Workspace.once, Workspace.own
    monkeypatch.setattr(Workspace, "once", lambda work, name, run: once(work, name, found.noted(name, run)))
    monkeypatch.setattr(Workspace, "own", lambda work, of, name, run: own(work, of, name, found.noted(name, run)))
    return found


@pytest.fixture
def room_for(monkeypatch):
    """A device whose memory takes a number of samples."""
    from hf_subprune.collection.stream import Stream

    run = Stream.run

    def limit(samples):
        def limited(stream, index, **options):
            if len(stream.batches[index]["input_ids"]) > samples:
                raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            run(stream, index, **options)

        monkeypatch.setattr(Stream, "run", limited)

    return limit
