import itertools
import random

import pytest

from hf_subprune.allocation import budgets
from hf_subprune.allocation.budgets import (
    Choices,
    allowed_widths,
    equal_fraction,
    equal_loss,
    interpolate,
    least_loss,
    rounding,
    tie,
    undominated,
    uniform_widths,
)


def problem(rng, blocks=4, convex=True):
    """Random falling curves over a few widths."""
    choices = []
    for _ in range(blocks):
        widths = allowed_widths(rng.randint(3, 6), 1)
        drops = sorted((rng.uniform(0.1, 3) for _ in widths[1:]), reverse=convex)
        losses = [sum(drops[i:]) for i in range(len(widths))]
        each = rng.choice([1.0, 2.0])
        choices.append(Choices(widths, tuple(each * w for w in widths), tuple(losses)))
    return choices


def spent(choices, widths):
    return sum(c.costs[c.widths.index(w)] for c, w in zip(choices, widths, strict=True))


def lost(choices, widths):
    return sum(c.losses[c.widths.index(w)] for c, w in zip(choices, widths, strict=True))


@pytest.mark.parametrize("method", [least_loss, equal_loss])
@pytest.mark.parametrize("convex", [True, False])
def test_budgets_are_met_to_within_one_step(method, convex):
    rng = random.Random(0)
    for _ in range(100):
        choices = problem(rng, convex=convex)
        low, high = (sum(c.costs[i] for c in choices) for i in (0, -1))
        budget = rng.uniform(low, high)
        widths = method(choices, budget)
        assert spent(choices, widths) <= budget
        for c, w in zip(choices, widths, strict=True):
            if w < c.widths[-1]:
                step = c.costs[c.widths.index(w) + 1] - c.costs[c.widths.index(w)]
                assert spent(choices, widths) + step > budget


def least_lost(choices, budget):
    """Of all combinations of widths within the budget."""
    combinations = itertools.product(*(c.widths for c in choices))
    return min(lost(choices, widths) for widths in combinations if spent(choices, widths) <= budget)


@pytest.mark.parametrize("convex", [True, False])
def test_least_loss_is_optimal_where_combinations_are_few(convex):
    rng = random.Random(1)
    for _ in range(50):
        choices = problem(rng, convex=convex)
        budget = rng.uniform(sum(c.costs[0] for c in choices), sum(c.costs[-1] for c in choices))
        assert lost(choices, least_loss(choices, budget)) == pytest.approx(least_lost(choices, budget))


def test_least_loss_is_optimal_on_convex_curves_of_one_price_however_many_combinations_there_are(monkeypatch):
    monkeypatch.setattr(budgets, "_MOST_COMBINATIONS", 0)
    rng = random.Random(1)
    for _ in range(50):
        choices = [Choices(c.widths, tuple(map(float, c.widths)), c.losses) for c in problem(rng)]
        budget = rng.randint(len(choices), sum(c.widths[-1] for c in choices))
        assert lost(choices, least_loss(choices, budget)) == pytest.approx(least_lost(choices, budget))


def test_of_combinations_that_lose_alike_the_dearest_is_taken():
    choices = [Choices((1, 2, 3), (1.0, 2.0, 3.0), (0.0, 0.0, 0.0)), Choices((1, 2), (1.0, 2.0), (1.0, 0.0))]
    assert least_loss(choices, 4) == [2, 2]
    assert least_loss(choices, 9) == [3, 2]


def test_equal_loss_bounds_every_block_by_the_least_common_amount():
    rng = random.Random(2)
    for _ in range(50):
        choices = problem(rng)
        budget = rng.uniform(sum(c.costs[0] for c in choices), sum(c.costs[-1] for c in choices))
        widths = equal_loss(choices, budget)
        worst = max(c.losses[c.widths.index(w)] for c, w in zip(choices, widths, strict=True))
        for amount in {loss for c in choices for loss in c.losses if loss < worst}:
            smallest = [next(w for w, x in zip(c.widths, c.losses, strict=True) if x <= amount) for c in choices]
            assert spent(choices, smallest) > budget


@pytest.mark.parametrize("method", [least_loss, equal_loss])
def test_a_budget_below_the_smallest_widths_is_refused(method):
    with pytest.raises(ValueError, match=r"smallest widths cost 3, the budget is 2"):
        method([Choices((1, 2), (3.0, 6.0), (1.0, 0.0))], 2)


def test_losses_are_interpolated_and_never_rise_with_the_width():
    points = [(2, 1.0), (4, 3.0), (6, 2.0), (10, 0.0)]
    assert interpolate(points, [1, 2, 4, 5, 6, 8, 10]) == pytest.approx((3.0, 3.0, 3.0, 6**0.5, 2.0, 1.0, 0.0))


def test_what_is_lost_without_a_block_is_taken_as_it_is():
    assert interpolate([(0, 0.5), (2, 1.0), (4, 0.0)], [0, 1, 2, 3, 4]) == pytest.approx((0.5, 1.0, 1.0, 0.5, 0.0))


def test_losses_fall_by_equal_parts_between_points_and_evenly_to_the_full_width():
    points = [(10, 8.0), (40, 1.0), (50, 0.0)]
    assert interpolate(points, [10, 20, 30, 40]) == pytest.approx((8.0, 4.0, 2.0, 1.0))
    assert interpolate(points, [40, 42, 45, 50]) == pytest.approx((1.0, 0.8, 0.5, 0.0))


def test_uniform_widths_are_rounded_down_each_by_its_own_multiple():
    assert uniform_widths([100, 12], 0.55, [8, 1]) == [48, 6]
    assert uniform_widths([100, 12], 0.55) == [55, 6]
    assert uniform_widths([100], 1, 8) == [100]
    assert uniform_widths([10], 0.05) == [0]


def test_equal_fraction_is_the_largest_that_fits():
    def cost(widths):
        return sum(widths)

    assert equal_fraction([10, 20], [1, 1], cost, 15) == [5, 10]
    assert equal_fraction([10, 20], [1, 1], cost, 30) == [10, 20]
    assert equal_fraction([10, 20], [1, 1], cost, 16) == [5, 11]
    assert 0 in equal_fraction([10, 20], [1, 1], cost, 1)


def test_rounding_is_used_where_blocks_are_large_enough():
    assert [rounding(units, 8) for units in (127, 128)] == [1, 8]
    assert allowed_widths(20, 8) == (8, 16, 20)
    assert allowed_widths(4, 8) == (4,)
    assert allowed_widths(20, 8, none=True) == (0, 8, 16, 20)


def test_what_loses_more_than_something_cheaper_is_no_choice():
    choices = Choices(("a", "b", "c", "d", "all"), (1.0, 2.0, 3.0, 4.0, 5.0), (5.0, 6.0, 2.0, 2.0, 0.0))
    found = undominated(choices)
    assert found == Choices(("a", "c", "d", "all"), (1.0, 3.0, 4.0, 5.0), (5.0, 2.0, 2.0, 0.0))
    assert undominated(found) == found


def test_tied_blocks_add_up():
    one = Choices((1, 2), (1.0, 2.0), (3.0, 0.0))
    assert tie([one, one]) == Choices((1, 2), (2.0, 4.0), (6.0, 0.0))
    with pytest.raises(ValueError, match="same widths"):
        tie([one, Choices((1, 3), (1.0, 3.0), (3.0, 0.0))])
