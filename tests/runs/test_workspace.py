import pytest
import torch

from hf_subprune.runs.store import Files, Store
from hf_subprune.runs.workspace import Workspace


@pytest.fixture(params=["in memory", "on disk"])
def folder(request, tmp_path):
    return tmp_path / "run" if request.param == "on disk" else None


class Counted:
    """Computes another value every time."""

    def __init__(self):
        self.times = 0

    def __call__(self):
        self.times += 1
        return {"time": self.times, "tensor": torch.full((3,), float(self.times))}


def test_a_run_that_is_started_again_computes_nothing_a_second_time(folder):
    compute = Counted()
    first, again = (Workspace(folder).once("found", compute) for _ in range(2))
    other = Workspace(folder).once("found elsewhere", compute)
    assert first["time"] == 1 and torch.equal(first["tensor"], torch.full((3,), 1.0))
    assert again["time"] == (2 if folder is None else 1)
    assert other["time"] == compute.times == (3 if folder is None else 2)


def test_the_owner_computes_and_all_get_what_it_found(folder, monkeypatch):
    compute = Counted()
    work = Workspace(folder)
    own = work.own(0, "blocks/model.layers.0", compute)
    assert own["time"] == work.exchange(0, own)["time"] == 1
    assert work.own(1, "blocks/model.layers.1", compute) is None
    assert compute.times == 1
    again = Workspace(folder).own(0, "blocks/model.layers.0", compute)
    assert again["time"] == (2 if folder is None else 1)


def test_what_fails_is_computed_again(folder):
    def fail():
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        Workspace(folder).once("found", fail)
    assert Workspace(folder).once("found", Counted())["time"] == 1


def test_what_not_all_processes_have_written_is_computed_by_all(tmp_path, monkeypatch):
    compute = Counted()
    Workspace(tmp_path).once("found", compute)
    monkeypatch.setattr("hf_subprune.runs.workspace.from_all", lambda value: [value, False])
    assert Workspace(tmp_path).once("found", compute)["time"] == 2


def test_again_goes_on_with_files_and_clock_and_has_nothing_to_take_back(folder):
    taken_back = []
    work = Workspace(folder)
    work.undo.callback(taken_back.append, "first")
    with work.clock("data"):
        pass
    before = dict(work.clock.seconds)
    again = work.again()
    assert (again.folder, again.clock.seconds) == (folder, before)
    with again.clock("data"), again.clock("discovery"):
        pass
    assert work.clock.seconds == before and set(again.clock.seconds) == {"data", "discovery"}
    again.undo.close()
    assert not taken_back
    work.undo.close()
    assert taken_back == ["first"]


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_a_failure_takes_back_what_was_done_the_last_first(failure):
    taken_back, work = [], Workspace()
    with pytest.raises(failure), work.undone_on_failure():
        work.undo.callback(taken_back.append, "first")
        work.undo.callback(taken_back.append, "second")
        raise failure
    assert taken_back == ["second", "first"]
    with work.undone_on_failure():
        work.undo.callback(taken_back.append, "third")
    assert taken_back == ["second", "first"]


def test_nothing_large_stays_in_memory_and_nothing_at_all_where_there_are_files(tmp_path):
    assert Workspace().holds(2**30) and not Workspace().holds(2**40)
    assert not Workspace(tmp_path).holds(1)


def test_stores_and_room_are_in_files_only_where_there_are_any(tmp_path):
    assert type(Workspace().store("walk")) is Store
    Workspace().check_space(lambda: 2**80, "this")
    store = Workspace(tmp_path / "run").store("walk")
    assert isinstance(store, Files) and store.folder == tmp_path / "run" / "walk" and store.folder.is_dir()
    with pytest.raises(OSError, match=r"This can take up to .* GB"):
        Workspace(tmp_path).check_space(lambda: 2**80, "this")
