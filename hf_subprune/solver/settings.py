"""How blocks are solved, the same for all blocks of a model."""

from dataclasses import dataclass
from typing import Protocol

import torch

# What is used when there are no two folds to cross-fit on.
PRIOR_SHRINKAGE = 0.1
# Of selection, where there are as many rows as columns or fewer: less with more rows. It only steadies the choice: the
# prior counts in favour of columns with large weights, whatever they add to the output.
_SELECTION_SHRINKAGE = 0.01


class Configured(Protocol):
    """What `Settings.of` reads of a config."""

    @property
    def shrinkage(self) -> float | str: ...
    @property
    def importance(self) -> str: ...
    @property
    def method(self) -> str: ...
    @property
    def swaps(self) -> int: ...
    @property
    def reweight(self) -> bool: ...
    @property
    def seed(self) -> int: ...


@dataclass(frozen=True)
class Tuning:
    """Where selection trades precision, time and memory.

    Args:
        panel: Pivots that elimination takes at a time.
        first_pool: Candidates that the first panel is speculated on.
        pool: Candidates that further panels are speculated on, per column that the last panel showed to matter.
        whole: Part of the columns left beyond which candidates are all of them.
        whole_panel: Pivots that are then taken at a time.
        double_below: Up to this many columns selection is all in float64; beyond, in float32 until that would not do.
        jointly: Tied blocks of up to this many columns in all are one selection problem, which takes memory with the
            square of them.
        epsilon: Of stochastic greedy, which reaches `1 - 1/e - epsilon` of the best in expectation where `F` is
            submodular.
    """

    panel: int = 64
    first_pool: int = 192
    pool: float = 1.5
    whole: float = 0.5
    whole_panel: int = 128
    double_below: int = 1024
    jointly: int = 4096
    epsilon: float = 0.01

    def dtype(self, n: int) -> torch.dtype:
        """In which selection among `n` columns computes."""
        return torch.float64 if n <= self.double_below else torch.float32


TUNING = Tuning()


@dataclass(frozen=True)
class Settings:
    """How units are chosen and new weights are made.

    Args:
        shrinkage: lambda >= 0 of the pull towards the original weights, in multiples of `mean(diag H)`, or `"auto"` to
            cross-fit it for each block.
        importance: `"greedy"` for selection by the objective, or a baseline of `importance.IMPORTANCES`.
        method: One of `selection.METHODS`: how importance `"greedy"` searches.
        swaps: Largest number of exchanges in swap refinement; `None` goes on until none improves, 0 does none.
        reweight: Whether weights on the kept units are solved for; `False` keeps them, bias included.
        seed: Of random choices, the same for each block.
        tuning: Of selection.
    """

    shrinkage: float | str = "auto"
    importance: str = "greedy"
    method: str = "auto"
    swaps: int | None = None
    reweight: bool = True
    seed: int = 0
    tuning: Tuning = TUNING

    @classmethod
    def of(cls, config: Configured) -> "Settings":
        """The settings that a `PruneConfig` says, whose negative `swaps` mean no limit."""
        return cls(
            shrinkage=config.shrinkage,
            importance=config.importance,
            method=config.method,
            swaps=None if config.swaps < 0 else config.swaps,
            reweight=config.reweight,
            seed=config.seed,
        )

    @property
    def fixed_shrinkage(self) -> float:
        """lambda of fits where it is not cross-fitted."""
        return PRIOR_SHRINKAGE if self.shrinkage == "auto" else float(self.shrinkage)

    def selection_shrinkage(self, rows: int, columns: int) -> float:
        """lambda that selection among so many columns uses, from the moments of so many rows; it is finite."""
        if self.shrinkage == "auto":
            return _SELECTION_SHRINKAGE * min(1.0, columns / max(rows, 1))
        return min(float(self.shrinkage), 1e6)

    def generator(self) -> torch.Generator:
        """A new generator of random choices, at its seed."""
        return torch.Generator().manual_seed(self.seed)
