import inspect
import sys

import pytest
from fresh import run_fresh

from hf_subprune.storage.on_import import when_imported


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package on the path, with a module that notes when it runs."""
    name = "imported_here"
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("ran = []\n")
    (tmp_path / name / "part.py").write_text(f"import {name}\n{name}.ran.append('part')\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield name
    for module in (name, f"{name}.part"):
        sys.modules.pop(module, None)


def test_it_happens_once_behind_the_import_and_leaves_no_trace(package):
    finders = list(sys.meta_path)
    done = []
    when_imported(f"{package}.part", lambda: done.append(list(sys.modules[package].ran)))
    assert package not in sys.modules and done == []
    part = __import__(f"{package}.part").part
    assert done == [["part"]] and sys.meta_path == finders
    assert type(part.__loader__) is type(inspect.__loader__) and part.__spec__.loader is part.__loader__
    assert "ran.append" in inspect.getsource(part)


def test_it_happens_at_once_for_what_was_imported_before(package):
    __import__(f"{package}.part")
    done = []
    when_imported(f"{package}.part", lambda: done.append(True))
    assert done == [True]


def test_an_import_that_fails_is_waited_for_again(package, tmp_path):
    file = tmp_path / package / "part.py"
    whole = file.read_text()
    file.write_text("raise RuntimeError('broken')")
    done = []
    when_imported(f"{package}.part", lambda: done.append(True))
    with pytest.raises(RuntimeError, match="broken"):
        __import__(f"{package}.part")
    assert done == []
    file.write_text(whole)
    __import__(f"{package}.part")
    assert done == [True]


@pytest.mark.slow
@pytest.mark.parametrize(
    "imports",
    [
        "import hf_subprune; from transformers import LlamaForCausalLM",
        "from transformers import LlamaForCausalLM; import hf_subprune",
        "import hf_subprune; from transformers import Trainer",
        "import hf_subprune, transformers.quantizers.auto, transformers.modeling_utils",
    ],
)
def test_transformers_knows_ragged_models_whichever_is_imported_first(imports):
    script = f"""
        import json, sys
        assert not sys.modules.keys() & {{"hf_subprune", "transformers"}}
        {imports}
        from transformers import PreTrainedConfig, PreTrainedModel
        print(json.dumps([hasattr(m, "replaced") for m in (PreTrainedModel.post_init, PreTrainedConfig.from_dict)]))
        """
    assert run_fresh(script, imported="torch")[0] == [True, True]
