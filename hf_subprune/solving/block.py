"""Solve one block from its moments: which units stay, and the weights that read them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from transformers.utils import logging

from ..allocation.survey import Survey
from ..blocks import Block
from ..collection.block_moments import BlockMoments
from ..report.records import BlockReport
from ..solver.solve import BlockSolution, Choice
from ..solver.solve import solve as solve_problem
from ..solver.tied import choose_together
from ..surgery.edits import kept_columns

logger = logging.get_logger(__name__)


@dataclass(frozen=True, eq=False)
class SolvedBlock:
    """What to do to one block.

    Args:
        report: Of the block.
        kept: `(k,)` int64, sorted: the units that stay, on the CPU.
        weight: `(k * c, m)`, the consumer's new weight, inputs by outputs, in its dtype, on the CPU.
        bias: `(m,)`, its new bias; `None` without one.
    """

    report: BlockReport
    kept: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None


def choose_units(survey: Survey, blocks: Sequence[Block], moments: dict[str, BlockMoments], width: int) -> Choice:
    """The units that blocks keep which must all keep the same ones, from the original model's moments of all."""
    return choose_together([survey.problem(b, moments[b.name]) for b in blocks], width, survey.settings)


def solve_block(
    survey: Survey, block: Block, moments: BlockMoments | None, width: int, chosen: Choice | None
) -> SolvedBlock:
    """Select, unless units were chosen for all blocks that share them, and reweight one block.

    Args:
        survey: Of the model.
        block: Of it.
        moments: Of the block; they are used up. `None` where the block is solved already and only looked up.
        width: Number of units that it keeps.
        chosen: Units to keep.

    Raises:
        FileNotFoundError: the block was solved before the run was stopped, and its solution is gone.
    """
    if moments is None:
        raise FileNotFoundError(
            f"The solution of {block.name} ({block.consumer}.pt), which was finished, is gone: start the run anew."
        )
    start = time.perf_counter()
    consumer: Any = survey.model.get_submodule(block.consumer)
    try:
        solution, columns, error = _solution(survey, block, moments, width, chosen)
    except RuntimeError as failure:
        if moments.device.type == "cpu" or not should_reduce_batch_size(failure):
            raise
        logger.warning(f"Block {block.name} is solved on the CPU: its moments leave no room on {moments.device}.")
        clear_device_cache(garbage_collection=True)
        solution, columns, error = _solution(survey, block, moments.to("cpu"), width, chosen)
    kept = survey.units(block)[solution.kept_units.cpu()]
    report = BlockReport(
        name=block.name,
        kind=block.kind,
        stack=block.stack,
        consumer=block.consumer,
        units_before=block.units,
        units_after=width,
        kept_units=tuple(kept.tolist()),
        kept_columns=tuple(columns.tolist()),
        fitted_error=solution.fitted_error,
        held_out_error=error,
        shrinkage=solution.shrinkage if survey.settings.reweight and width else None,
        method=solution.method if block.sets == 1 else f"{solution.method}, query heads",
        guarantee=solution.guarantee,
        seconds=time.perf_counter() - start,
        **survey.predictions(block),
    )
    bias = None if consumer.bias is None else consumer.bias.detach() + solution.bias_shift.to(consumer.bias)
    weight = solution.V.to(consumer.weight.dtype)
    return SolvedBlock(report, kept, weight.cpu(), None if bias is None else bias.cpu())


def _solution(
    survey: Survey, block: Block, moments: BlockMoments, width: int, chosen: Choice | None
) -> tuple[BlockSolution, torch.Tensor, float]:
    """The solution of one block, where its moments are, the consumer's columns that stay, and the held-out error."""
    # Where a solution that finds no room is tried again elsewhere, the sums are read once more.
    problem = survey.problem(block, moments, last=survey.stored is None and moments.device.type == "cpu")
    solution = solve_problem(problem, width, survey.settings, chosen)
    W = problem.W
    del problem  # its moments are as large as the held-out ones may be
    columns = solution.kept_columns
    if block.name in survey.present:
        columns = kept_columns(block, survey.units(block))[columns.cpu()]
        W = survey.weight(block).to(moments.device)
    held_out = moments.held_out_error(W, columns, solution.V, solution.bias_shift)
    return solution, columns, solution.fitted_error if held_out is None else held_out
