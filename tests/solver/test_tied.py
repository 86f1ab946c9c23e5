"""Units of several blocks at once, against brute force."""

import itertools
from dataclasses import replace

import pytest
import torch

from hf_subprune.solver.moments import MomentAccumulator
from hf_subprune.solver.objective import Objective, regularise
from hf_subprune.solver.problem import Problem
from hf_subprune.solver.settings import Settings, Tuning
from hf_subprune.solver.tied import choose_together, order_together


def problems(units=4, outputs=(5, 5), scales=(1.0, 1.0)):
    """Two blocks of 12 and 8 columns."""
    random, found = torch.Generator().manual_seed(0), []
    for n, m, scale in zip((12, 8), outputs, scales, strict=True):
        W = scale * torch.randn(n, m, generator=random)
        mix = torch.randn(n, n, generator=random)
        folds = []
        for _ in range(2):
            accumulator = MomentAccumulator(n, intercept=False)
            accumulator.update(torch.randn(40, n, generator=random) @ mix)
            folds.append(accumulator.moments(W))
        found.append(Problem(folds, W, torch.arange(n).view(units, -1)))
    return found


def captured(problems, kept):
    """The sum of the relative captured energies, block by block."""
    total = 0.0
    for problem in problems:
        moments = problem.total()
        shrinkage = Settings().selection_shrinkage(moments.rows, len(problem.W))
        H, C, t = regularise(moments, problem.W, shrinkage)
        total += Objective(H, C, problem.groups).value(torch.tensor(kept)) / t
    return total


@pytest.mark.parametrize("outputs", [(5, 5), (5, 3)])
def test_the_units_chosen_capture_most_in_all_blocks_together(outputs):
    blocks = problems(outputs=outputs)
    for k in (1, 3):  # greedy is exact for one unit, and backward for all but one
        choice = choose_together(blocks, k, Settings())
        best = max(itertools.combinations(range(4), k), key=lambda units: captured(blocks, units))
        assert tuple(choice.kept.tolist()) == best
        assert choice.method == ("greedy, tied" if k == 1 else "backward, tied")


def test_large_outputs_count_no_more_than_others_unless_a_metric_says_so():
    plain, loud = problems(), problems(scales=(1.0, 100.0))
    orders = [order_together(blocks, Settings()).tolist() for blocks in (plain, loud)]
    assert orders[0] == orders[1]
    weighed = [replace(block, output_metric=torch.eye(5)) for block in loud]
    alone = order_together(weighed[1:], Settings()).tolist()
    assert order_together(weighed, Settings()).tolist() == alone != orders[0]


def test_large_problems_rank_units_by_what_removing_each_costs():
    blocks, settings = problems(), Settings(tuning=Tuning(jointly=4))
    choice = choose_together(blocks, 3, settings)
    assert tuple(choice.kept.tolist()) == max(
        itertools.combinations(range(4), 3), key=lambda units: captured(blocks, units)
    )
    assert choice.method == "removal costs, tied"
    order = order_together(blocks, settings)
    assert set(order[:3].tolist()) == set(choice.kept.tolist())
    drops = [captured(blocks, range(4)) - captured(blocks, sorted({0, 1, 2, 3} - {u})) for u in order.tolist()]
    assert drops == sorted(drops, reverse=True)


def test_importances_are_added_up_over_the_blocks():
    choice = choose_together(problems(), 2, Settings(importance="weight_norm"))
    norms = [p.W.double()[p.groups].square().sum((1, 2)).sqrt() for p in problems()]
    shares = sum(norm / norm.sum() for norm in norms)
    assert choice.kept.tolist() == shares.topk(2).indices.sort().values.tolist()
    assert choice.method == "weight_norm, tied"


def test_blocks_of_different_numbers_of_units_are_refused():
    one, other = problems()[0], problems(units=2)[1]
    with pytest.raises(ValueError, match=r"got \[4, 2\]"):
        choose_together([one, other], 1, Settings())
