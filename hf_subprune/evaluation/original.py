"""What the original model puts out and costs, taken down before it is changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..data.batches import Samples
from ..models.running import Batch
from .costs import Costs, brief, count
from .outputs import Outputs, model_outputs


@dataclass(frozen=True, eq=False)
class Original:
    """The original, for as long as it takes to compare with it.

    Args:
        outputs: On `samples.own_held_out`.
        measured_on: The batch whose forwards are timed, and of whose first sample multiply-accumulates are counted.
        costs: Parameters and multiply-accumulates.
    """

    outputs: Sequence[Outputs]
    measured_on: Batch
    costs: Costs

    @classmethod
    def of(cls, samples: Samples, *, whole: bool = False) -> Original:
        """Of the model that samples are for, as it is now.

        Args:
            samples: Of the model.
            whole: Measure costs on a whole batch, as sizes in seconds or multiply-accumulates do, in place of a part.
        """
        batch = samples.held_out[0] if whole else brief(samples.held_out[0])
        return cls(model_outputs(samples.model, samples.own_held_out), batch, count(samples.model, batch))
