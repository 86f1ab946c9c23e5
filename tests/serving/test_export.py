import sys

import pytest
from command_line import run
from served import byte_level, causal_lm

import hf_subprune


@pytest.fixture
def folder(tmp_path):
    causal_lm(num_hidden_layers=1).save_pretrained(tmp_path / "model")
    byte_level().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_the_command_does_what_the_function_does(folder, tmp_path):
    pytest.importorskip("gguf")
    said = run("export", folder, "--to", "gguf", "--out", tmp_path / "first.gguf")
    assert f"Exported to {tmp_path / 'first.gguf'}" in said.replace("\n", "")
    assert hf_subprune.export(folder, "gguf", tmp_path / "second.gguf") == tmp_path / "second.gguf"
    first, second = ((tmp_path / f"{name}.gguf").read_bytes() for name in ("first", "second"))
    assert first == second and first[:4] == b"GGUF"


def test_nothing_that_is_there_is_overwritten(folder, tmp_path):
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(FileExistsError, match="mine is there already"):
        hf_subprune.export(folder, "gguf", tmp_path / "mine")
    assert (tmp_path / "mine").read_text() == "mine"


def test_unknown_targets_and_missing_packages_are_named(folder, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"to must be 'gguf'.*got 'zip'"):
        hf_subprune.export(folder, "zip", tmp_path / "out")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"takes the package gguf: pip install \"hf_subprune\[export\]\""):
        hf_subprune.export(folder, "gguf", tmp_path / "out")
