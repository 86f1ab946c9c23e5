"""Solve every block that loses units, in the order in which the variant needs them, and install what was found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import nn

from ..allocation.choice import Widths
from ..allocation.survey import Survey
from ..blocks import Block, Group, groups_of
from ..collection.block_moments import BlockMoments
from ..collection.segments import Segment
from ..collection.stream import Rest
from ..collection.walk import StoredWalk, Walk
from ..report.records import BlockReport
from ..runs.memory import release_memory
from ..runs.processes import is_mine, processes
from ..runs.stages import SOLVING, advance, begin
from ..runs.workspace import Workspace
from ..solver.solve import Choice
from ..surgery.edits import Edit, shrink, taken_back, undo_all
from .block import SolvedBlock, choose_units, solve_block

# Memory is given back after so many blocks that are solved alone, or segments: what comes next would take most of it
# again, and the system clears each page that it hands out.
_RELEASED = 4

Install = Callable[[nn.Module, Block, torch.Tensor, torch.Tensor, torch.Tensor | None], Edit]
"""Removes units of a block of a model: the units that stay, the consumer's weight on them, and its bias."""


@dataclass(frozen=True, eq=False)
class Solved:
    """Blocks that have lost units, by name in the order in which they did.

    Args:
        edits: In place in the model.
        reports: Of what was solved.
        rest: Of the original's forwards, where that came by.
    """

    edits: dict[str, Edit] = field(default_factory=dict)
    reports: dict[str, BlockReport] = field(default_factory=dict)
    rest: Rest | None = None


def solve(survey: Survey, widths: Widths, work: Workspace, install: Install = shrink) -> Solved:
    """Compute which units of every block stay, and new weights for what reads them; install each as it is found.

    For each segment of the model: targets of the original; for each group of blocks that read nothing of one another:
    observe, solve, install; advance. Blocks that share their units are solved before all others, on the original.

    Args:
        survey: Of the model as it is; its model is changed.
        widths: Of one of the survey's sizes.
        work: What is solved is kept there; its `undo` takes all edits back.
        install: `surgery.edits.shrink`, or `surgery.masking.mask` for a model that keeps its shapes.

    Raises:
        ValueError: a block's inputs hold NaN or inf; the message names it.
    """
    solved = Solved()
    work.undo.callback(undo_all, solved.edits)
    begin(SOLVING, len(widths.blocks))
    rest = _Loop(survey, widths, work, install, solved).run()
    return replace(solved, rest=rest or survey.rest)


class _Loop:
    """One run of `solve`, whose arguments it has."""

    def __init__(self, survey: Survey, widths: Widths, work: Workspace, install: Install, solved: Solved) -> None:
        self.survey, self.widths, self.work, self.solved = survey, widths, work, solved
        self._install_one = install
        self._worked = 0  # times that memory was left behind
        self._pending: list[tuple[Block, SolvedBlock | None]] = []

    def run(self) -> Rest | None:
        """Blocks that share their units first, then segment by segment; what is left of the original's forwards."""
        edits, variant = self.solved.edits, self.widths.config.streams()
        for group in groups_of(self.widths.blocks):
            if group.share == "units":
                self._solve_tied(group)
        alone = [block for block in self.widths.blocks if block.tie is None]
        walk = self.survey.walk(alone, variant, self.work, beforehand=edits, name="walk")
        with taken_back(edits) if walk.independent else nullcontext():
            for segment in walk.resume():
                self._solve(segment.blocks, {})
                self._install()
                release_memory()
            for segment in walk.left:
                self._solve_segment(walk, segment)
            self._install()
        return walk.rest()

    def _solve_tied(self, group: Group) -> None:
        """Units for all blocks of the group, from moments of the original model."""
        moments: dict[str, BlockMoments] = {}
        with self.work.clock("calibration"), taken_back(self.solved.edits):
            walk = self.survey.walk(group.blocks, "layer", self.work, beforehand={})
            for segment in walk.left:
                walk.start(segment)
                moments |= walk.moments(segment.blocks)
                walk.finish(segment)
        with self.work.clock("selection"):
            by_width: dict[int, list[Block]] = {}  # what is to go altogether has another width
            for block in group.blocks:
                by_width.setdefault(self.widths.kept[block.name], []).append(block)
            for width, blocks in by_width.items():
                mine = is_mine(self.survey.owners[blocks[0].name])
                self._solve(blocks, moments, choose_units(self.survey, blocks, moments, width) if mine else None)
            self._install()
        release_memory()

    def _solve_segment(self, walk: Walk | StoredWalk, segment: Segment) -> None:
        """Observe, solve and install the blocks of one segment, then advance."""
        clock = self.work.clock
        with clock("calibration"):
            walk.start(segment)
        for group in groups_of(segment.blocks):
            # Blocks that read nothing of one another are observed at once, unless their moments are at hand anyway.
            together = [[block] for block in group.blocks] if walk.independent else [group.blocks]
            for blocks in together:
                with clock("calibration"):
                    moments = walk.moments(blocks, self._kept(segment))
                with clock("selection"):
                    self._solve(blocks, moments)
                    if not walk.independent or len(self._pending) >= processes():
                        self._install()
                if walk.independent:  # elsewhere forwards come that would take the memory again
                    self._release()
        with clock("calibration"):
            walk.finish(segment, self._kept(segment))
        if not walk.independent:
            self._release()

    def _kept(self, segment: Segment) -> dict[str, torch.Tensor]:
        """By name, the units that blocks of a segment keep, of those that were installed."""
        edits = self.solved.edits
        return {block.name: edits[block.name].kept for block in segment.blocks if block.name in edits}

    def _release(self) -> None:
        """Give memory back, now and then."""
        self._worked += 1
        if self._worked % _RELEASED == 0:
            release_memory()

    def _solve(self, blocks: Sequence[Block], moments: dict[str, BlockMoments], chosen: Choice | None = None) -> None:
        """Solve those blocks that fall to this process; of those that were solved before, nothing is asked.

        Moments are let go of, block by block.
        """
        for block in blocks:
            compute = partial(
                solve_block,
                self.survey,
                block,
                moments.pop(block.name, None),
                self.widths.kept[block.name],
                chosen,
            )
            owner = self.survey.owners[block.name]
            self._pending.append((block, self.work.own(owner, f"blocks/{block.consumer}", compute)))

    def _install(self) -> None:
        """Change the model as was found, here or in other processes."""
        for block, own in self._pending:
            found = self.work.exchange(self.survey.owners[block.name], own)
            self.solved.reports[block.name] = found.report
            # A copy: the edit holds it, and with it the mapped file of all of the solution.
            edit = self._install_one(self.survey.model, block, found.kept.clone(), found.weight, found.bias)
            self.solved.edits[block.name] = edit
            advance()
        self._pending.clear()
