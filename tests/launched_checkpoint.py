"""What each process of `test_processes.py` runs on checkpoints: prune one, or stop one process midway."""

import os
import sys
import time
from pathlib import Path

from batches import ready_batches
from runs_of import QUICK
from tiny import tiny

from hf_subprune import PruneConfig, prune_checkpoint
from hf_subprune.runs import store
from hf_subprune.runs.processes import state

VARIANTS = ("layer", "asym")


def checkpoint_pruned(source, out, variant):
    """The report of one run."""
    return prune_checkpoint(source, ready_batches(tiny("llama")), PruneConfig(**QUICK, variant=variant), out)


def stop_at_second_commit(path, values):
    """While the other process has committed the same segment."""
    if len(values) == 2:
        time.sleep(3)
        os._exit(1)
    write_json(path, values)


if __name__ == "__main__":
    write_json = store.write_json
    if sys.argv[3:] == ["stop"] and state().process_index == 1:
        store.write_json = stop_at_second_commit
    for variant in VARIANTS:
        checkpoint_pruned(sys.argv[1], Path(sys.argv[2]) / variant, variant)
    state().destroy_process_group()
