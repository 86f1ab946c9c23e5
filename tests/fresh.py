"""Pruned models, and Python code in a process that knows nothing of them."""

import atexit
import functools
import json
import tempfile
import textwrap
from contextlib import ExitStack
from pathlib import Path

from forked import forks
from hand_pruned import FAMILIES

from hf_subprune.storage.layout import choose_layout

IMPORTED = (
    "transformers.models.auto.modeling_auto",
    "transformers.models.bert.modeling_bert",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
    "transformers.models.t5.modeling_t5",
    "transformers.quantizers.auto",
)
WIDTHS = {"mlp": [40, 36], "heads": [3, 2]}


def ragged(family, **kept):
    model = FAMILIES[family].pruned(**(kept or WIDTHS))
    assert choose_layout(model, "ragged", inputs=FAMILIES[family].inputs).kind == "ragged"
    return model


def run_fresh(script, *args):
    """Run Python code in a new process; its last line of output is JSON.

    A fork of one that has imported Transformers, and this package not: as long as a test process lasts, it stays.
    """
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        (code,) = _server().run("-c", textwrap.dedent(script), *args, output=(out, err))
        errors = err.read_text(encoding="utf-8")
        assert code == 0, errors
        return json.loads(out.read_text(encoding="utf-8").splitlines()[-1]), errors


@functools.cache
def _server():
    stack = ExitStack()
    atexit.register(stack.close)
    return stack.enter_context(forks(*IMPORTED, HF_HUB_OFFLINE="1"))
