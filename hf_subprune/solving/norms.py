"""Running statistics of batch norms, taken anew once what they read has changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..data.batches import Samples, samples_in
from ..evaluation.drift import Drift, drift
from ..evaluation.outputs import Outputs
from ..models.running import call
from ..runs.processes import from_all, own_share, summed
from ..runs.workspace import Workspace


def renew_statistics(samples: Samples, reference: Sequence[Outputs], work: Workspace) -> tuple[Drift, int]:
    """Take mean and variance of what every batch norm reads anew, on the samples to fit on.

    Those of the original describe what the original's norms read. The new ones are means over batches, in which each
    norm normalises by the batch's own, as in training; batches of one sample are left out. Unless the drift on
    held-out samples is less with them, the old ones are put back.

    Args:
        samples: Their model is the pruned one, in evaluation mode.
        reference: What the original puts out on samples held out.
        work: Its `undo` gets what puts the old ones back.

    Returns:
        Drift of the model as it is then, and how many norms have new statistics.
    """
    before = _drift(samples, reference)
    norms = _norms(samples.model)
    batches = [samples.fit[number] for number in own_share(len(samples.fit))]
    batches = [batch for batch in batches if samples_in(batch) > 1]
    count = sum(from_all(len(batches)))
    if not norms or not count:
        return before, 0
    with ExitStack() as undo:
        for norm in norms:
            undo.callback(_put_back(norm))
        with _averaging(norms):
            for batch in batches:
                call(samples.model, batch)
        for norm in norms:
            for mean in filter(torch.is_floating_point, norm.buffers()):  # all but the count of batches
                mean.copy_(summed(mean * len(batches)) / count)
        after = _drift(samples, reference)
        if after.distance >= before.distance:
            return before, 0
        work.undo.callback(undo.pop_all().close)
    return after, len(norms)


def _drift(samples: Samples, reference: Sequence[Outputs]) -> Drift:
    return drift(samples.model, samples.own_held_out, reference, shared=True)


def _norms(model: nn.Module) -> list[_BatchNorm]:
    """Batch norms that keep statistics, in memory."""
    found = (module for module in model.modules() if isinstance(module, _BatchNorm))
    return [norm for norm in found if norm.running_mean is not None and not norm.running_mean.is_meta]


def _put_back(norm: _BatchNorm) -> Callable[[], None]:
    """What gives the buffers of a norm, the very same ones, the values that they have now."""
    before = [(buffer, buffer.clone()) for buffer in norm.buffers()]

    def put_back() -> None:
        for buffer, value in before:
            buffer.copy_(value)

    return put_back


@contextmanager
def _averaging(norms: Sequence[_BatchNorm]) -> Iterator[None]:
    """Inside, norms start afresh, and their statistics are means over the batches that they read."""
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.eval()
