"""What the original model puts out and costs, taken down before it is changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..data.batches import Samples
from .costs import Costs, count
from .drift import Outputs, model_outputs


@dataclass(frozen=True, eq=False)
class Original:
    """The original, for as long as it takes to compare with it.

    Args:
        outputs: On `samples.own_held_out`.
        costs: Parameters and multiply-accumulates.
    """

    outputs: Sequence[Outputs]
    costs: Costs

    @classmethod
    def of(cls, samples: Samples) -> Original:
        """Of the model that samples are for, as it is now."""
        return cls(model_outputs(samples.model, samples.own_held_out), count(samples.model, samples.held_out[0]))
