"""What each process of `test_processes.py` runs: prune tiny models, and save what came out by the process's rank."""

import sys
from pathlib import Path

import torch
from batches import ready_batches
from runs_of import QUICK
from tiny import tiny

from hf_subprune import PruneConfig, prune
from hf_subprune.runs.processes import state

RUNS = {
    "layer": ("bert", {}),
    "asym": ("bert", {"variant": "asym"}),
    "residual": ("llama", {"variant": "residual"}),
    "seq": ("llama", {"variant": "seq"}),
    "global": ("llama", {"budget": "global", "layout": "ragged"}),
    "tied": ("mpnet", {}),
}


def pruned(name):
    """The report and the weights of one run."""
    family, settings = RUNS[name]
    model = tiny(family)
    report = prune(model, ready_batches(model), PruneConfig(**QUICK, **settings))
    return report.to_dict(), model.state_dict()


if __name__ == "__main__":
    results = {name: pruned(name) for name in RUNS}
    torch.save(results, Path(sys.argv[1]) / f"{state().process_index}.pt")
    state().destroy_process_group()
