"""Moments of real activations: the MLPs of the demo model on docstrings."""

from dataclasses import dataclass

import torch
from transformers import AutoModel, AutoTokenizer

from ..collection.planning import plan
from ..collection.walk import Walk
from ..config import PruneConfig
from ..data.reading import read
from ..demo import demo_model_folder, docstrings
from ..discovery.discover import discover
from ..models.linears import weight_matrix
from ..solver.moments import Moments, combine
from ..solver.objective import objective_of
from ..solver.problem import Problem
from ..solver.reweighting import cross_fit, relative_error, reweight
from ..solver.selection import select
from ..solver.settings import Settings


@dataclass(frozen=True, eq=False)
class RealProblem:
    """One block of the demo model.

    Args:
        folds: Moments of the two halves of the calibration samples.
        held_out: Of samples that nothing is fitted on.
        W: `(n, m)`, the consumer's weight, inputs by outputs.
    """

    folds: list[Moments]
    held_out: Moments
    W: torch.Tensor

    @property
    def total(self) -> Moments:
        """Moments of all calibration samples."""
        return combine(self.folds)


def demo_problems(samples: int = 128, held_out: int = 32, count: int = 3) -> dict[str, RealProblem]:
    """The first, the last and evenly spaced MLPs in between, by block name.

    Args:
        samples: Paragraphs of docstrings to calibrate on.
        held_out: Further ones.
        count: Number of blocks.
    """
    folder = demo_model_folder()
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    config = PruneConfig(samples=samples, held_out=held_out)
    batches = read(model, docstrings(samples + held_out), config, tokenizer)
    blocks = [block for block in discover(model, batches.probe).blocks if block.kind == "mlp"]
    chosen = [blocks[round(i * (len(blocks) - 1) / max(count - 1, 1))] for i in range(count)]
    problems = {}
    walk = Walk(batches, plan(batches, chosen), dict.fromkeys((block.name for block in chosen), 0))
    for segment in walk.left:
        walk.start(segment)
        for block in segment.blocks:
            moments = walk.moments([block])[block.name]
            W = weight_matrix(model.get_submodule(block.consumer)).clone()
            problems[block.name] = RealProblem(moments.of_folds(W), moments.held_out.moments(W), W)
    return problems


def bench_shrinkage(problem: RealProblem, *, keep: float = 0.5, fixed: tuple[float, ...] = (1e-4, 1.0)) -> dict:
    """Relative error on held-out rows with the lambda that cross-fitting chooses, and with others.

    Args:
        problem: The block.
        keep: Fraction of the columns kept, by greedy.
        fixed: Values of lambda to compare with.

    Returns:
        `chosen`: the lambda; `errors`: by lambda, as text, with `"cross-fitted"` for the chosen one.
    """
    total = problem.total
    objective = objective_of(Problem(problem.folds, problem.W), Settings())
    kept = select(objective, max(1, round(keep * objective.units)), Settings()).kept
    chosen = cross_fit(problem.folds, problem.W, kept).shrinkage

    def error(shrinkage: float) -> float:
        new = reweight(total, problem.W, kept, shrinkage)
        return relative_error(problem.held_out, kept, new.V, new.bias_shift)

    return {"chosen": chosen, "errors": {f"{x:g}": error(x) for x in fixed} | {"cross-fitted": error(chosen)}}
