"""What is known of a model before it is pruned: its blocks, what each would lose at any width, what it costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from ..blocks import Block, Discovery
from ..collection.block_moments import BlockMoments
from ..collection.observers import Targets
from ..collection.planning import plan
from ..collection.segments import Plan
from ..collection.sensitivity import Means
from ..collection.stream import Rest
from ..collection.walk import StoredWalk, Walk, walk
from ..config import PruneConfig
from ..data.batches import Samples
from ..evaluation.costs import InTurn, times_in_turn
from ..evaluation.original import Original
from ..evaluation.outputs import Outputs
from ..models.linears import weight_matrix
from ..models.running import Batch, is_offloaded
from ..runs.workspace import Workspace
from ..solver.curves import LossCurve
from ..solver.moments import restrict
from ..solver.problem import Problem
from ..solver.settings import Settings
from ..surgery.edits import Edit, kept_columns, taken_back
from .budgets import interpolate
from .families import Families
from .propagation import Points
from .targets import Target

# Seconds that latencies are measured in, where they are the target and elsewhere; there at most that part of the run.
LATENCY_SECONDS = 4.0
_REPORTED_SECONDS, _REPORTED_SHARE = 0.3, 0.05


@dataclass(frozen=True, eq=False)
class Survey:
    """A model with all that pruning it to any of several sizes needs.

    Args:
        samples: The batches, and their model, as it was when it was surveyed and is to be when a size is chosen.
        configs: The sizes; they differ in size, budget, layout and rounding only.
        probe: A small batch, on the model's device.
        found: All blocks and refusals.
        blocks: That the configs let us prune, in forward order.
        candidates: Those of them that some target can take units from.
        targets: What each config asks for, in their order.
        families: How blocks are tied for each config, in their order.
        plan: The segments that hold the candidates.
        owners: By block name, the process that solves the block.
        original: What the model costs before anything goes.
        begun: First tokens of texts that the model has continued, `None` if it has not.
        continued: How it did.
        metrics: By block name, `M` of `sensitivity.output_metrics`; blocks left out weigh outputs equally.
        gradients: By block name, `sensitivity.activation_gradients`, where the importance reads them.
        curves: By block name, the error at every width; empty when every budget is uniform. Of a family that gets one
            width, a few blocks have one.
        losses: By block name, `(width, predicted drift)` points, of its curve or of that of the nearest block.
        query_losses: The same of query heads, for the blocks that could lose these instead.
        stored: By block name, the moments of the original model; `None` where they are collected again for each size.
        outputs: What the candidates' consumers put out on all batches; `None` where they run again for each size.
        rest: Of the original's forwards on batches held out, where they have come so far.
        reference: What the original puts out on them, where the model of the survey is not the original.
        present: By block name, `(k,)` int64, sorted: the units that are left of a block that is masked in part.
    """

    samples: Samples
    configs: Sequence[PruneConfig]
    probe: Batch
    found: Discovery
    blocks: Sequence[Block]
    candidates: Sequence[Block]
    targets: Sequence[Target]
    families: Sequence[Families]
    plan: Plan
    owners: Mapping[str, int]
    original: Original
    begun: torch.Tensor | None = None
    continued: torch.Tensor | None = None
    metrics: Means = field(default_factory=Means)
    gradients: Mapping[str, torch.Tensor] = field(default_factory=dict)
    curves: Mapping[str, LossCurve] = field(default_factory=dict)
    losses: Mapping[str, Points] = field(default_factory=dict)
    query_losses: Mapping[str, Points] = field(default_factory=dict)
    stored: Mapping[str, BlockMoments] | None = None
    outputs: Targets | None = None
    rest: Rest | None = None
    reference: Sequence[Outputs] | None = None
    present: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def model(self) -> PreTrainedModel:
        """That of the samples."""
        return self.samples.model

    @property
    def settings(self) -> Settings:
        """How blocks are solved, whatever the size."""
        return Settings.of(self.configs[0])

    def target(self, config: PruneConfig) -> Target:
        """What one of the configs asks for on this model."""
        return self.targets[list(self.configs).index(config)]

    def families_of(self, config: PruneConfig) -> Families:
        """How blocks are tied for one of the configs."""
        return self.families[list(self.configs).index(config)]

    def full_cost(self, target: Target) -> float:
        """What the model costs with all units, in the target's unit."""
        return target.cost({b.name: b.units for b in self.blocks})

    def may_leave_out(self) -> bool:
        """Whether one of the sizes lets blocks go altogether because others would lose more."""
        sizes = zip(self.configs, self.families, strict=True)
        return any(families.let_blocks_go(config.allocation()) for config, families in sizes)

    def predicted(self) -> dict[str, Points]:
        """`losses`; where there are none, more of the units that are left is better, whatever it is."""
        return {b.name: self.losses.get(b.name, ((0, 1.0), (b.units, 0.0))) for b in self.blocks}

    def predicted_loss(self, blocks: Sequence[Block], kept: Mapping[str, int]) -> float:
        """Sum of the predicted drifts of blocks, some with query heads as units, at widths by name."""
        points = ((self.losses if block.sets == 1 else self.query_losses)[block.name] for block in blocks)
        return sum(interpolate(p, [kept[b.name]])[0] for b, p in zip(blocks, points, strict=True))

    def predictions(self, block: Block) -> dict[str, Any]:
        """The block's curves, for the report; there are none of query heads."""
        if block.name not in self.curves or block.sets > 1:
            return {}
        return {"curve": self.curves[block.name].errors, "predicted": self.losses[block.name]}

    def units(self, block: Block) -> torch.Tensor:
        """`(k,)` int64, sorted: the units of a block that can be chosen from."""
        present = self.present.get(block.name)
        return torch.arange(block.units) if present is None else present

    def weight(self, block: Block) -> torch.Tensor:
        """`(n, m)`: the weight of a block's consumer as it is now, inputs by outputs."""
        return weight_matrix(self.model.get_submodule(block.consumer))

    def of_blocks(self, blocks: Sequence[Block]) -> Survey:
        """The survey without sensitivities of any but some blocks."""
        names = {block.name for block in blocks}
        return replace(self, metrics=self.metrics.without([name for name in self.metrics if name not in names]))

    def solved(self) -> Survey:
        """The survey without what only selection and reweighting read, which is large."""
        return replace(self, metrics=Means(), gradients={}, stored=None, outputs=None)

    def problem(self, block: Block, moments: BlockMoments, *, last: bool = False) -> Problem:
        """What selection and reweighting need of one block; its moments are asked for no more if this is the last."""
        W = self.weight(block).to(moments.device)
        metric, gradient = self.metrics.get(block.name), self.gradients.get(block.name)
        metric = None if metric is None else metric.to(moments.device)
        folds = moments.of_folds(W, last=last)
        if block.name not in self.present:
            return Problem(folds, W, block.columns, metric, block.sets, gradient)
        units = self.units(block)
        columns = kept_columns(block, units)
        position = torch.full((len(W),), -1)
        position[columns] = torch.arange(len(columns))
        return Problem(
            [restrict(fold, columns) for fold in folds],
            W[columns.to(W.device)],
            position[block.columns[units]].to(W.device),
            metric,
            gradient=None if gradient is None else gradient[columns],
        )

    def walk(
        self, blocks: Sequence[Block], variant: str, work: Workspace, *, beforehand: Mapping[str, Edit], name: str = ""
    ) -> Walk | StoredWalk:
        """The walk over some of the blocks.

        Args:
            blocks: In forward order.
            variant: Of the moments.
            work: Where the walk is made durable, if it has a name.
            beforehand: Edits of other blocks.
            name: Of the walk's files.
        """
        if self.stored is not None:
            return StoredWalk(self.stored, blocks)
        parts = self.plan if list(blocks) == list(self.candidates) else plan(self.samples, blocks)
        known = self.outputs
        if known is not None and not known.blocks >= {block.name for block in blocks}:
            known = None
        return walk(
            variant,
            self.samples,
            parts,
            self.owners,
            beforehand=beforehand,
            store=work.store(name) if name else None,
            targets=None if known is None else known.again(),
        )

    def latency(self, edits: Mapping[str, Edit], spent: float) -> InTurn | None:
        """Seconds of a forward with the edits, as the model is, and inside, where they are taken back, the original's.

        `None` where weights are read from elsewhere meanwhile.

        Args:
            edits: In place in the model.
            spent: Seconds that the run has taken so far: what is only reported may take a part of that.
        """
        if is_offloaded(self.model):
            return None
        seconds = LATENCY_SECONDS
        if "latency" not in {config.target() for config in self.configs}:
            seconds = min(_REPORTED_SECONDS, _REPORTED_SHARE * spent)
        return times_in_turn(self.model, self.original.measured_on, partial(taken_back, edits), seconds)
