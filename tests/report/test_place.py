import json
import os
import subprocess

import pytest
from sample_report import make_report

from hf_subprune.report import place as module
from hf_subprune.report.place import ASIDE, FILES_NAME, claimed, written


def put(folder, **contents):
    """A result of these files, and a report, in a folder."""
    with claimed(folder) as place:
        make_report().save(place.staged)
        for name, content in contents.items():
            (place.staged / name.replace("__", ".")).write_text(content)
        place.install()


def held(folder):
    return {path.name: path.read_text() for path in folder.iterdir() if path.suffix in (".safetensors", ".txt")}


@pytest.fixture(autouse=True)
def plain(without_plots):
    pass


def test_a_result_replaces_the_files_of_an_earlier_one_and_no_others(tmp_path):
    out = tmp_path / "out"
    put(out, a__safetensors="first", b__safetensors="first")
    (out / "notes.txt").write_text("mine")
    put(out, a__safetensors="second")
    assert held(out) == {"a.safetensors": "second", "notes.txt": "mine"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_files_of_others_that_lie_in_the_way_are_set_aside(tmp_path):
    out = tmp_path / "out"
    make_report().save(out)  # all of ours that is there
    (out / "model.safetensors").write_text("mine")
    (out / "other.safetensors").write_text("mine too")
    put(out, model__safetensors="ours")
    assert held(out) == {"model.safetensors": "ours"}
    assert (out / f"model.safetensors{ASIDE}").read_text() == "mine"
    assert (out / f"other.safetensors{ASIDE}").read_text() == "mine too"


def test_links_and_the_current_folder_are_served(tmp_path, monkeypatch):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    put(tmp_path / "link", a__safetensors="x")
    assert (tmp_path / "link").is_symlink() and held(tmp_path / "disk") == {"a.safetensors": "x"}
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    put(".", a__safetensors="y")
    put("../here/.", a__safetensors="z")
    assert held(tmp_path / "here") == {"a.safetensors": "z"}


def test_where_nothing_can_be_moved_in_from_beside_it_is_staged_inside(tmp_path, monkeypatch):
    out = tmp_path / "mount"
    out.mkdir()
    tried = module._try

    def trial(place):
        if place.partial.parent != out:
            raise OSError(18, "Invalid cross-device link")
        tried(place)

    monkeypatch.setattr(module, "_try", trial)
    put(out, a__safetensors="x")
    put(out, a__safetensors="y")
    assert held(out) == {"a.safetensors": "y"}
    assert {path.name for path in out.iterdir() if path.name.startswith(".")} == set()
    assert [path.name for path in tmp_path.iterdir()] == ["mount"]


@pytest.mark.parametrize("number", range(9))
@pytest.mark.parametrize("failure", [OSError(5, "Input/output error"), KeyboardInterrupt()])
def test_a_move_that_fails_leaves_the_earlier_result(tmp_path, monkeypatch, number, failure):
    out = tmp_path / "out"
    put(out, a__safetensors="first", b__safetensors="first")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    move, moves = module._move, []

    def failing(source, target):
        moves.append(source)
        if len(moves) == number + 1:
            raise failure
        move(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(module, "_move", failing)
        with pytest.raises(type(failure), match="is complete in .*new" if isinstance(failure, OSError) else None):
            put(out, a__safetensors="second", c__safetensors="second")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    put(out, a__safetensors="second", c__safetensors="second")
    assert held(out) == {"a.safetensors": "second", "c.safetensors": "second"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_kill_between_moves_is_mended_by_the_next_run(tmp_path, monkeypatch):
    out = tmp_path / "out"
    put(out, a__safetensors="first", b__safetensors="first")
    move, moves = module._move, []

    def killed(source, target):
        moves.append(source)
        if len(moves) > 6:
            os._exit(9)
        move(source, target)

    child = os.fork()
    if child == 0:
        module._move = killed
        put(out, a__safetensors="second", c__safetensors="second")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert (tmp_path / ".out.partial" / "old").is_dir()
    with claimed(out):
        assert held(out) == {"a.safetensors": "first", "b.safetensors": "first"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_list_names_nothing_outside_of_its_folder(tmp_path):
    out = tmp_path / "out"
    put(out, a__safetensors="x")
    (tmp_path / "precious.txt").write_text("mine")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").write_text("mine")
    (out / "link").symlink_to(tmp_path / "elsewhere")
    names = ["../precious.txt", str(tmp_path / "precious.txt"), "link/file", 3, "a.safetensors"]
    (out / FILES_NAME).write_text(json.dumps(names))
    assert "a.safetensors" in written(out)
    put(out, a__safetensors="y")
    assert (tmp_path / "precious.txt").exists() and (tmp_path / "elsewhere" / "file").exists()


def test_one_run_at_a_time_also_in_one_process(tmp_path):
    with claimed(tmp_path / "out"), pytest.raises(BlockingIOError, match=f"Process {os.getpid()} on "):
        put(tmp_path / "out", a__safetensors="x")
    put(tmp_path / "out", a__safetensors="x")


def test_a_mount_point_is_served(tmp_path):
    out = tmp_path / "mount"
    out.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "none", str(out)], capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    try:
        put(out, a__safetensors="x")
        put(out, a__safetensors="y")
        assert held(out) == {"a.safetensors": "y"}
    finally:
        subprocess.run(["umount", str(out)], check=True)


def test_a_system_without_user_ids_or_open_folders_will_do(tmp_path, monkeypatch):
    monkeypatch.delattr("os.getuid")
    with claimed(tmp_path / "out") as place:
        assert place.partial.is_dir()
    assert not place.partial.exists()
