"""What `import hf_subprune` brings in, and what it offers."""

import subprocess
import sys

import pytest

import hf_subprune
from hf_subprune.training.callback import SubpruneCallback
from hf_subprune.training.recovery import recover


def test_everything_that_is_offered_is_there():
    assert hf_subprune.SubpruneCallback is SubpruneCallback
    assert hf_subprune.recover is recover
    assert all(getattr(hf_subprune, name) is not None for name in hf_subprune.__all__)
    assert set(hf_subprune.__all__) <= set(dir(hf_subprune))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = hf_subprune.nothing


@pytest.mark.slow
def test_importing_the_package_leaves_trainer_and_plots_alone():
    code = "import sys, hf_subprune; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "hf_subprune.pruning" in loaded
    assert not {"transformers.trainer", "hf_subprune.training.callback", "matplotlib", "peft", "evaluate"} & set(
        loaded
    )
