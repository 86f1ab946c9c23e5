"""A model and texts on disk, for commands on them."""

import pytest

# Imported where it is needed: see the conftest above.


@pytest.fixture
def folder(tmp_path):
    from command_line import save_encoder

    return save_encoder(tmp_path / "model")


@pytest.fixture
def texts(tmp_path):
    from command_line import write_texts

    return write_texts(tmp_path / "texts.txt")


@pytest.fixture(autouse=True)
def _libraries_speak(monkeypatch):
    """A command that is run in this process would silence them for the tests that come."""
    monkeypatch.setattr("hf_subprune.cli.commands.silence_libraries", lambda: None)
