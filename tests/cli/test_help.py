import subprocess
import sys
from typing import get_args

import pytest
from typer.testing import CliRunner

import hf_subprune
from hf_subprune.cli import app
from hf_subprune.cli.help import repeated
from hf_subprune.cli.options import TaskName
from hf_subprune.config import VARIANTS
from hf_subprune.evaluation.tasks import TASKS


def shown(*words, width=80):
    result = CliRunner().invoke(app, words, env={"COLUMNS": str(width)})
    assert result.exit_code == 0
    return result.output


def test_the_help_of_prune_fits_on_a_screen_and_has_an_example():
    lines = shown("prune", "--help").splitlines()
    assert len(lines) <= 80 and max(map(len, lines)) <= 80
    printed = "\n".join(lines)
    assert "Example: hf-subprune prune MODEL --data texts.txt --out smaller" in printed
    assert all(option in printed for option in ("--data", "--out", "--keep", "--device", "--json", "--help-all"))
    assert "--attn-implementation" not in printed


def test_all_of_the_help_has_every_option_its_choices_and_what_it_means():
    printed = " ".join(shown("prune", "--help-all", width=160).replace("│", " ").split())
    assert "--attn-implementation" in printed and "--round-to" in printed
    assert f"<{'|'.join(VARIANTS)}>" in printed.replace(" ", "")
    assert "never fitted on, that the report measures output drift on" in printed


def test_the_version_is_shown():
    assert shown("--version") == f"hf-subprune {hf_subprune.__version__}\n"


def test_a_word_that_is_no_choice_is_refused_with_the_choices():
    result = CliRunner().invoke(app, ["prune", "model", "--data", "x", "--out", "y", "--variant", "sideways"])
    assert result.exit_code == 2 and all(variant in result.output for variant in VARIANTS)


def test_the_choices_of_tasks_are_the_tasks():
    choices, _ = get_args(get_args(TaskName)[0])
    assert get_args(choices) == tuple(TASKS)


@pytest.mark.parametrize(
    ("words", "spelled"),
    [
        ("prune M --keep 0.75 0.5 --seed 3", "prune M --keep 0.75 --keep 0.5 --seed 3"),
        ("prune --keep 0.75 --keep 0.5 M", "prune --keep 0.75 --keep 0.5 M"),
        ("prune M --units mlp attention --out mlp", "prune M --units mlp --units attention --out mlp"),
        ("prune M --units mlp,attention channels", "prune M --units mlp,attention --units channels"),
        ("prune --keep 0.5 M 0.7", "prune --keep 0.5 M 0.7"),
    ],
)
def test_several_values_stand_behind_one_option(words, spelled):
    assert repeated(words.split()) == spelled.split()


def test_help_takes_no_more_time_than_twice_that_of_hf():
    seconds = [_cpu_seconds(module) for module in ("hf_subprune.cli", "huggingface_hub.cli.hf")]
    assert seconds[0] < 2 * seconds[1]


def _cpu_seconds(module):
    """Least of three runs of a command's help."""
    code = f"import sys; sys.argv = ['x', '--help']; from {module} import main; main()"
    timed = f"import os, subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}], capture_output=True); "
    timed += "t = os.times(); print(t.children_user + t.children_system)"
    words = [sys.executable, "-c", timed]
    return min(float(subprocess.run(words, capture_output=True, text=True, check=True).stdout) for _ in range(3))
