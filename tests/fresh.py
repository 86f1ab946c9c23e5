"""Pruned models, and Python code in a process that knows nothing of them."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

from hand_pruned import FAMILIES

from hf_subprune.storage.layout import choose_layout

WIDTHS = {"mlp": [40, 36], "heads": [3, 2]}


def ragged(family, **kept):
    model = FAMILIES[family].pruned(**(kept or WIDTHS))
    assert choose_layout(model, "ragged", inputs=FAMILIES[family].inputs).kind == "ragged"
    return model


def run_fresh(script, *args):
    """Run Python code in a new process; its last line of output is JSON."""
    root = Path(__file__).parent
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join([str(root), str(root.parent)])}
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr
