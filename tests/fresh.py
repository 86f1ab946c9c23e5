"""Pruned models, and Python code in a process that knows nothing of them."""

import json
import tempfile
import textwrap
from pathlib import Path

from forked import SERVERS
from hand_pruned import FAMILIES

from hf_subprune.storage.layout import choose_layout

WIDTHS = {"mlp": [40, 36], "heads": [3, 2]}


def ragged(family, **kept):
    model = FAMILIES[family].pruned(**(kept or WIDTHS))
    assert choose_layout(model, "ragged", inputs=FAMILIES[family].inputs).kind == "ragged"
    return model


def run_fresh(script, *args, imported="transformers"):
    """Run Python code in a new process, which knows nothing of this package; its last line of output is JSON.

    Args:
        script: The code.
        args: Behind its name in `sys.argv`.
        imported: Names the server that it is forked off, by what that has imported.
    """
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        (code,) = SERVERS[imported].run("-c", textwrap.dedent(script), *args, output=(out, err))
        errors = err.read_text(encoding="utf-8")
        assert code == 0, errors
        return json.loads(out.read_text(encoding="utf-8").splitlines()[-1]), errors
