import platform
import subprocess
import sys

import psutil
import pytest
import torch

from hf_subprune.runs.memory import release_memory


def resident():
    return psutil.Process().memory_info().rss


@pytest.mark.skipif(sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="the C library is another")
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

from hf_subprune.runs.memory import freed_at_once

with freed_at_once() if sys.argv[1] == "at once" else nullcontext():
    torch.ones(7 * 2**20)  # 28 MiB: from now on the C library would keep pieces of that size
    before = psutil.Process().memory_info().rss
    pieces = [torch.ones(2**18) for _ in range(40)]  # 1 MiB each
    del pieces
    print(psutil.Process().memory_info().rss - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="the C library is another")
@pytest.mark.parametrize("way, least, most", [("at once", 0, 10), ("by and by", 30, 50)])
def test_large_tensors_are_given_back_when_they_are_freed(way, least, most):
    done = subprocess.run([sys.executable, "-c", HELD, way], capture_output=True, text=True, check=True)
    assert least <= int(done.stdout) / 2**20 <= most
