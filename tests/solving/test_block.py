"""One block, solved where there is room for it."""

import torch
from batches import ready_batches
from runs_of import QUICK
from tiny import tiny

from hf_subprune import PruneConfig, prune
from hf_subprune.allocation.survey import Survey
from hf_subprune.collection.block_moments import BlockMoments


def test_a_block_is_solved_on_the_cpu_where_its_device_has_no_room(monkeypatch):
    expected = prune(tiny("llama"), ready_batches(tiny("llama")), PruneConfig(**QUICK, budget="uniform"))
    device, to, problem = BlockMoments.device, BlockMoments.to, Survey.problem
    asked, moved = [], []

    def fail_on_device(survey, block, moments, *, last=None):
        if last is None:  # query heads are compared with key/value heads, before any block is solved
            return problem(survey, block, moments)
        asked.append(last)
        if not moved:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return problem(survey, block, moments, last=last)

    def move(moments, where):
        moved.append(where)
        monkeypatch.setattr(BlockMoments, "device", device)
        return to(moments, where)

    monkeypatch.setattr(Survey, "problem", fail_on_device)
    monkeypatch.setattr(BlockMoments, "to", move)
    monkeypatch.setattr(BlockMoments, "device", property(lambda _: torch.device("cuda")))
    report = prune(tiny("llama"), ready_batches(tiny("llama")), PruneConfig(**QUICK, budget="uniform"))
    assert moved == ["cpu"]
    assert not asked[0] and all(asked[1:])  # the sums must outlast the first try
    assert [b.kept_units for b in report.blocks] == [b.kept_units for b in expected.blocks]
