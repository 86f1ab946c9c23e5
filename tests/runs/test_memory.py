"""What a run takes of the memory, and when it gives it back."""

import platform
import subprocess
import sys

import psutil
import pytest
import torch
from batches import ready_batches
from runs_of import QUICK
from tiny import tiny

from hf_subprune import PruneConfig, prune
from hf_subprune.runs import memory
from hf_subprune.runs.memory import peak_memory, release_memory
from hf_subprune.solving import loop

GLIBC = pytest.mark.skipif(
    sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="the C library is another"
)


def resident():
    return psutil.Process().memory_info().rss


@GLIBC
def test_what_was_freed_between_pieces_in_use_is_given_back():
    release_memory()
    before = resident()
    pieces = [torch.ones(2**14) for _ in range(2**11)]  # 64 KiB each, on the heap
    in_use = pieces[::2]
    del pieces
    held = resident() - before
    release_memory()
    assert held > 100 * 2**20
    assert resident() - before < 80 * 2**20
    assert len(in_use) == 2**10


HELD = """
import sys
from contextlib import nullcontext

import psutil
import torch

from hf_subprune.models.running import evaluating
from hf_subprune.runs.memory import freed_at_once, reused

with {"at once": freed_at_once, "by and by": nullcontext, "reused": reused}[sys.argv[1]]():
    if sys.argv[1] != "reused":
        torch.ones(7 * 2**20)  # 28 MiB: from now on the C library would keep pieces of that size
    before = psutil.Process().memory_info().rss
    pieces = [torch.ones(2**18) for _ in range(40)]  # 1 MiB each
    del pieces
    print(psutil.Process().memory_info().rss - before)
"""


@pytest.mark.slow
@GLIBC
@pytest.mark.parametrize("way, least, most", [("at once", 0, 10), ("by and by", 30, 50), ("reused", 30, 50)])
def test_large_tensors_are_given_back_when_they_are_freed(way, least, most):
    done = subprocess.run([sys.executable, "-c", HELD, way], capture_output=True, text=True, check=True)
    assert least <= int(done.stdout) / 2**20 <= most


@GLIBC
@pytest.mark.parametrize("variant", ["layer", "seq"])
def test_memory_is_given_back_after_every_block_or_layer(monkeypatch, computed, variant):
    """Each block leaves 64 MiB behind that lie between pieces in use, and sees what has become of those before it."""
    held, in_use, start = [], [], [0]

    def look():
        if in_use:
            held.append((resident() - start[0]) / 2**20)
            in_use.clear()

    def leave_behind(name):
        if name.startswith("blocks/"):
            look()
            release_memory()
            start[0] = resident()
            pieces = [torch.ones(2**14) for _ in range(2**11)]
            in_use.extend(pieces[::2])

    computed.before = leave_behind
    monkeypatch.setattr(loop, "_RELEASED", 1)
    model = tiny("llama")
    report = prune(model, ready_batches(model), PruneConfig(**QUICK, variant=variant, budget="uniform"))
    look()
    shrunk = sum(block.units_after < block.units_before for block in report.blocks)
    assert shrunk == len(held) == 2 * model.config.num_hidden_layers
    if variant == "layer":
        assert all(size < 80 for size in held)
    else:  # in a layer whose blocks read one another forwards come between, which would take the memory again
        assert all(size > 100 for size in held[0::2]) and all(size < 80 for size in held[1::2])


def test_the_most_that_was_taken_is_in_bytes_on_every_system(monkeypatch):
    most = peak_memory()
    assert resident() / 2 < most < psutil.virtual_memory().total
    monkeypatch.setattr("sys.platform", "darwin")  # where the system counts bytes
    assert peak_memory() == pytest.approx(most / 1024, rel=0.1)

    class Windows:
        def memory_info(self):
            return type("Info", (), {"peak_wset": 5 * 2**20})()

    monkeypatch.setattr(memory.psutil, "Process", Windows)
    monkeypatch.setitem(sys.modules, "resource", None)
    assert peak_memory() == 5 * 2**20
