"""Values that stages keep, in memory and in files."""

from fractions import Fraction

import pytest
import torch

from hf_subprune.runs.store import Files, Store

CPU = torch.device("cpu")


@pytest.fixture(params=[Store, Files])
def store(request, tmp_path):
    return Files(tmp_path / "store") if request.param is Files else Store()


def test_what_is_kept_is_read_again(store):
    value = (torch.arange(6.0).view(2, 3), None, {"x": torch.ones(1)})
    kept = store.part("outputs").keep("0-1", value)
    found = store.part("outputs").read(kept, CPU)
    assert torch.equal(found[0], value[0]) and found[1] is None and torch.equal(found[2]["x"], value[2]["x"])


def test_sums_are_those_of_all_that_was_added(store):
    total = store.sum("M", 3, CPU)
    assert not total.total().any()
    for step in range(3):
        total.add(torch.full((3, 3), float(step)))
    total.add_up()  # of one process
    assert total.total().dtype == torch.float64 and (total.total() == 3).all()


def test_plain_values_are_read_as_they_were(store):
    value = {"part": Fraction(1, 3), "names": frozenset({"a", "b"}), "widths": ((1, 2.0), None)}
    assert store.read(store.keep("plain", value)) == value


def test_memory_outlasts_no_run():
    store = Store()
    store.commit(1, {"current": [{"layer": object()}]})
    assert store.finished() == 0
    with pytest.raises(KeyError):
        store.resume(1)


def test_a_file_that_was_dropped_is_gone_though_its_value_is_held(tmp_path):
    store = Files(tmp_path)
    kept = store.keep("target", torch.ones(4))
    value = store.read(kept)
    store.drop(kept)
    assert not (tmp_path / kept).exists() and (value == 1).all()


def test_another_store_goes_on_behind_the_last_final_step(tmp_path):
    store = Files(tmp_path)
    part = store.part("current")
    assert store.finished() == 0
    first = [{"layers.0": part.keep("0-0", torch.zeros(2))}, {"layers.0": None}]  # the second batch ran elsewhere
    store.commit(1, {"current": first})
    second = [{"layers.1": part.keep("0-1", torch.ones(2))}, {"layers.1": None}]
    store.commit(2, {"current": second})
    part.keep("0-2", torch.full((2,), 2.0))  # of a step that was not made final
    again = Files(tmp_path)
    assert again.finished() == 2
    (kept, nothing) = again.resume(2)["current"]
    assert nothing == {} and kept.keys() == {"layers.1"}
    assert torch.equal(again.part("current").read(kept["layers.1"]), torch.ones(2))
    assert not (tmp_path / "current" / first[0]["layers.0"]).exists()  # what only the first step needed
