"""Schedules of gradual pruning."""

import pytest

from hf_subprune.training.schedules import Schedule


def test_cubic_schedule_follows_the_equation():
    schedule = Schedule("cubic", steps=4)
    assert [schedule.removed(i) for i in range(5)] == [0, 1 - 0.75**3, 1 - 0.5**3, 1 - 0.25**3, 1]


def test_linear_schedule_removes_equally_many_at_each_step():
    schedule = Schedule("linear", steps=4)
    assert [schedule.removed(i) for i in range(5)] == [0, 0.25, 0.5, 0.75, 1]


def test_pruning_steps_are_spaced_equally_and_end_where_asked():
    schedule = Schedule(start=0.2, end=0.6, steps=4)
    due = [schedule.due(step, 100) for step in range(101)]
    assert [due.index(i) for i in range(1, 5)] == [30, 40, 50, 60]
    assert due[-1] == 4
    assert due == sorted(due)


def test_short_trainings_reach_every_pruning_step():
    schedule = Schedule(start=0.0, end=0.5, steps=10)
    assert [schedule.due(step, 4) for step in range(4)] == [0, 5, 10, 10]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"shape": "cosine"}, "'cubic', 'linear'; got 'cosine'"),
        ({"start": 0.5, "end": 0.5}, "start=0.5, end=0.5"),
        ({"end": 1.0}, "end=1.0"),
        ({"steps": 0}, "got 0"),
    ],
)
def test_bad_fields_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Schedule(**fields)


def test_a_schedule_is_made_of_a_name_or_of_its_own_dict():
    schedule = Schedule("linear", start=0.1, end=0.5, steps=3)
    assert Schedule.of(schedule.to_dict()) == schedule
    assert Schedule.of(schedule) is schedule
    assert Schedule.of("linear") == Schedule("linear")
