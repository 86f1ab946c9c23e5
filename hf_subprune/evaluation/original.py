"""What the original model costs, taken down before it is changed."""

from __future__ import annotations

from dataclasses import dataclass

from ..data.batches import Samples, brief
from ..models.running import Batch, input_device
from .costs import Costs, count

# Tokens of a forward that is timed for the report alone.
_MEASURED_TOKENS = 64


@dataclass(frozen=True, eq=False)
class Original:
    """The original, for as long as it takes to compare with it.

    Args:
        measured_on: The batch whose forwards are timed, and of whose first sample multiply-accumulates are counted.
        costs: Parameters and multiply-accumulates.
    """

    measured_on: Batch
    costs: Costs

    @classmethod
    def of(cls, samples: Samples, *, whole: bool = False) -> Original:
        """Of the model that samples are for, as it is now.

        Args:
            samples: Of the model.
            whole: Measure costs on a whole batch, as sizes in seconds or multiply-accumulates do. On a CPU, where that
                would take longer than all other figures, it is a part of one else.
        """
        batch = samples.measured_on
        if not whole and input_device(samples.model).type == "cpu":
            batch = brief(batch, _MEASURED_TOKENS)
        return cls(batch, count(samples.model, batch))
