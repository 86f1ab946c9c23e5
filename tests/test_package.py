"""What `import hf_subprune` brings in, and what it offers."""

import importlib.resources
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hf_subprune
from hf_subprune.training.callback import SubpruneCallback
from hf_subprune.training.recovery import recover


def test_everything_that_is_offered_is_there():
    assert hf_subprune.SubpruneCallback is SubpruneCallback
    assert hf_subprune.recover is recover
    assert all(getattr(hf_subprune, name) is not None for name in hf_subprune.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = hf_subprune.nothing


def test_only_what_is_offered_is_shown():
    assert [name for name in dir(hf_subprune) if not name.startswith("__")] == sorted(hf_subprune.__all__)
    assert {"__version__", "__all__", "__doc__", "__file__", "__name__", "__path__"} <= set(dir(hf_subprune))


def test_the_version_is_that_of_the_project():
    project = Path(__file__).parents[1] / "pyproject.toml"
    (version,) = re.findall(r'^version = "(.+)"$', project.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert hf_subprune.__version__ == version


def test_types_and_the_template_of_the_card_are_shipped():
    package = importlib.resources.files(hf_subprune)
    assert package.joinpath("py.typed").is_file()
    assert package.joinpath("report", "card_template.md").is_file()


@pytest.mark.parametrize("page", ["README.md", "recipes/README.md", "model_cards/README.md"])
def test_links_to_files_lead_to_files(page):
    page = Path(__file__).parents[1] / page
    links = re.findall(r"\]\((?!\w+:)([^)#]+)", page.read_text(encoding="utf-8"))
    assert links and [link for link in links if not (page.parent / link).exists()] == []


LIGHT = "hf_subprune", "hf_subprune.cli", "hf_subprune.cli.commands"


def test_importing_the_package_or_its_commands_brings_in_nothing_heavy():
    code = f"import sys, {', '.join(LIGHT)}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert set(LIGHT) <= set(loaded)
    assert not {"torch", "transformers", "datasets", "huggingface_hub", "numpy", "hf_subprune.pruning"} & set(loaded)
