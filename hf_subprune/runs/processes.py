"""Several processes that prune one model together: what each of them does, and how they come to the same result.

Every process holds the model, reads the same data and forms the same batches, so that batches and folds are those of
a single process; it runs its share of them. Sums over the batches are added up, blocks are solved by one process each,
and all of them install every solution. With one process nothing here does anything.
"""

from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, parse_flag_from_env, reduce

from ..solver.moments import MomentAccumulator

_T = TypeVar("_T")


def state() -> PartialState:
    """Of the processes that were launched together; on CPUs, accelerate wants to be told that it is on CPUs."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available())


def processes() -> int:
    """How many there are."""
    return state().num_processes


def is_mine(owner: int) -> bool:
    """Whether this process does what falls to the process `owner`."""
    return state().process_index == owner


def own_share(batches: int) -> list[int]:
    """Numbers of the batches that this process runs: every so many-th one, as they are sorted by length."""
    return list(range(batches)[state().process_index :: processes()])


def summed(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over all processes, for each of them."""
    return reduce(tensor, "sum") if processes() > 1 else tensor


def from_process(owner: int, value: _T) -> _T:
    """What `value` is in the process `owner`."""
    if processes() == 1:
        return value
    held = [value]
    broadcast_object_list(held, from_process=owner)
    return held[0]


def from_all(value: _T) -> list[_T]:
    """What `value` is in every process."""
    return gather_object([value]) if processes() > 1 else [value]


def add_up(moments: MomentAccumulator, owner: int) -> None:
    """Add the sums of all processes up in those of `owner`; those of the others are of no use any more."""
    if processes() == 1:
        return
    rows = from_all(moments.rows)
    moments.recentre(summed(moments.shift_sum()) / max(sum(rows), 1))
    for tensor in moments.sums():
        torch.distributed.reduce(tensor, dst=owner)
    moments.rows = sum(rows)
