import threading
import time

import pytest

from hf_subprune.runs.stages import Lines, Run, advance, begin, duration, expect, in_words, shown, steps


@pytest.fixture
def lines():
    return []


def test_stages_are_announced_in_order_with_their_number_and_the_time_left(lines):
    with shown(("One", "Two", "Three"), lambda: [Lines(lines.append)]):
        begin("One")
        expect({"One": 0.0, "Two": 0.0, "Three": 100.0})
        begin("Two")
        begin("Elsewhere")
        begin("Three")
    assert lines == [
        "[1/3] One, time left not known yet",
        "[2/3] Two, about 1 min 40 s left",
        "[3/3] Three, about 1 min 40 s left",
    ]


def test_what_is_shown_inside_of_something_is_a_part_of_it(lines):
    with shown(("Loading", "One", "Two"), lambda: [Lines(lines.append)]):
        begin("Loading")
        with shown(("One", "Two"), lambda: pytest.fail("It is shown already.")):
            begin("Two")
    assert [line.partition(",")[0] for line in lines] == ["[1/3] Loading", "[3/3] Two"]
    begin("One")  # nobody is shown that
    assert len(lines) == 2


def test_a_stage_that_comes_again_is_the_next_of_its_name_and_a_run_that_starts_over_goes_back(lines):
    with shown(("One", "Two", "One"), lambda: [Lines(lines.append)]):
        for name in ("One", "Two", "One", "Two"):
            begin(name)
    assert [line[:5] for line in lines] == ["[1/3]", "[2/3]", "[3/3]", "[2/3]"]


def test_a_stage_that_goes_on_is_not_announced_again(lines):
    with shown(("One",), lambda: [Lines(lines.append)]):
        assert list(steps("One", [1, 2])) == [1, 2]
        assert list(steps("One", [3])) == [3]
    assert len(lines) == 1


def test_long_stages_say_how_far_they_are(lines):
    came = threading.Event()

    def write(line):
        lines.append(line)
        if len(lines) == 2:
            came.set()

    with shown(("One",), lambda: [Lines(write, between=0.02)]):
        begin("One", 4)
        advance()
        assert came.wait(5)
    assert lines[1].startswith("[1/1] One: 1 of 4, ") and lines[1].endswith(" so far, time left not known yet")
    said = len(lines)
    time.sleep(0.05)
    assert len(lines) == said  # nothing comes behind the end


def test_the_time_left_follows_what_stages_took(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("hf_subprune.runs.stages.time.monotonic", lambda: clock[0])
    run = Run(("One", "Two", "Three"))
    run.start("One")
    assert run.left() is None
    run.expected = {"One": 10.0, "Two": 20.0, "Three": 30.0}
    assert run.left() == 60
    clock[0] = 20.0  # half as fast as it was expected
    run.start("Two", 10)
    assert run.left() == 50 * (15 + 20) / (15 + 10)
    clock[0], run.done = 40.0, 5
    assert run.left() == pytest.approx(0.5 * 20 + 0.5 * (20 * 1.4 - 20) + 30 * 1.4)


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.42, "0.4 s"), (12.4, "12 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")]
)
def test_durations_are_in_words(seconds, words):
    assert duration(seconds) == words
    assert in_words(seconds).startswith("about ") and in_words(seconds).endswith(" left")
