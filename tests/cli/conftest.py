"""A model and texts on disk, for commands on them."""

import pytest
from command_line import save_encoder, write_texts


@pytest.fixture
def folder(tmp_path):
    return save_encoder(tmp_path / "model")


@pytest.fixture
def texts(tmp_path):
    return write_texts(tmp_path / "texts.txt")


@pytest.fixture(autouse=True)
def _libraries_speak(monkeypatch):
    """A command that is run in this process would silence them for the tests that come."""
    monkeypatch.setattr("hf_subprune.cli.commands.silence_libraries", lambda: None)
