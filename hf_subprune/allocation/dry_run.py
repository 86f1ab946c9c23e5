"""What `prune` would do, found out from a few forwards: blocks, widths, sizes, time and memory."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from accelerate.utils import send_to_device
from rich.table import Table

from ..blocks import Block
from ..collection.block_moments import FOLDS
from ..collection.sensitivity import output_metrics
from ..config import PruneConfig
from ..data.batches import Samples
from ..data.reading import read
from ..data.trial import check_forward
from ..models.linears import matrix_shape
from ..models.running import input_device
from ..models.session import check_prunable, session
from ..report.records import Change
from ..report.tables import with_unit
from ..runs.memory import peak_memory
from ..runs.stages import FINDING, READING, begin, duration
from ..runs.workspace import Workspace
from .foresight import bytes_of_states, kinds_of, stage_seconds
from .surveying import find, leave_a_choice
from .widths import check_target


@dataclass(frozen=True)
class Foresight:
    """What a run would do.

    Args:
        architecture: Class of the model.
        blocks: Of each that may shrink: name, kind, units, and units left if all lost alike.
        parameters: Of the whole model, with these widths.
        size: Bytes of its weights.
        seconds: That stages take, by name.
        memory: Bytes of this process at most.
    """

    architecture: str
    blocks: tuple[tuple[str, str, int, int], ...]
    parameters: Change
    size: Change
    seconds: Mapping[str, float]
    memory: int

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        return asdict(self)

    def table(self) -> Table:
        """As a rich table."""
        table = Table(title=f"{self.architecture}, not pruned: what a run would do", title_justify="left")
        for name in ("block", "kind", "units", "left"):
            table.add_column(name, justify="left" if name in ("block", "kind") else "right", no_wrap=True)
        for name, kind, units, left in self.blocks:
            table.add_row(name, kind, str(units), str(left))
        table.caption = (
            f"Left: if all blocks lost alike; a run shares out by what they lose. Parameters "
            f"{with_unit(self.parameters.before)} to {with_unit(self.parameters.after)}, weights "
            f"{with_unit(self.size.before, 'B')} to {with_unit(self.size.after, 'B')}. It takes about "
            f"{duration(sum(self.seconds.values()))} and {with_unit(self.memory, 'B')} of memory here."
        )
        table.caption_justify = "left"
        return table


def foresee(model: Any, data: Any, config: PruneConfig, processing_class: Any = None) -> Foresight:
    """Find out what `prune` with these arguments would do, from a few forwards; the model is left as it is.

    Raises:
        TypeError, ValueError: as `prune`; whole experts are among the units.
    """
    if "experts" in config.units:
        raise ValueError("A dry run does not foresee which experts go: leave 'experts' out of `units`.")
    check_prunable(model, offloaded=True)
    with session(model):
        begin(READING)
        samples = read(model, data, config, processing_class)
        check_forward(samples)
        probe = send_to_device(samples.probe, input_device(model))
        start = time.perf_counter()
        _, blocks, (target,), (families,), candidates, _ = find(samples, [config], probe, Workspace())
        spent = time.perf_counter() - start
        widths = check_target(blocks, target, config, families)
        curves = leave_a_choice([config], [families], candidates)
        seconds = {FINDING: spent, **stage_seconds(samples, kinds_of(candidates), config, curves)}
        memory = _memory(samples, candidates, config)
    gone = sum((block.units - widths[block.name]) * block.parameters_per_unit for block in candidates)
    before, itemsize = model.num_parameters(), model.dtype.itemsize
    return Foresight(
        architecture=type(model).__name__,
        blocks=tuple((block.name, block.kind, block.units, widths[block.name]) for block in candidates),
        parameters=Change(before, before - gone),
        size=Change(before * itemsize, (before - gone) * itemsize),
        seconds=seconds,
        memory=memory,
    )


def _memory(samples: Samples, candidates: Sequence[Block], config: PruneConfig) -> int:
    """What the process takes once it has run one batch forward and backward, and what a run holds besides."""
    few = Samples.of(samples.model, samples.fit[-1:])
    if config.loss_aware:
        output_metrics(few, candidates)
    shapes = [matrix_shape(samples.model.get_submodule(block.consumer)) for block in candidates]
    states = bytes_of_states(samples, candidates, config)
    metrics = sum(8 * m * m for _, m in shapes) if config.loss_aware else 0
    widest, outputs = max(shapes, default=(0, 0))
    return peak_memory() + states + metrics + (FOLDS + 3) * 8 * widest * (widest + outputs)
