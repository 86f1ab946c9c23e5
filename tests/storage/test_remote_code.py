import json

import pytest
import torch
import transformers as tf
from fresh import ragged, run_fresh
from hand_pruned import FAMILIES, TOKENS, outputs
from safetensors.torch import load_file
from same import assert_same_weights

import hf_subprune.loading  # noqa: F401
from hf_subprune.storage.layout import choose_layout
from hf_subprune.storage.remote_code import auto_classes, write_remote_code

AUTO = {
    "bert": "AutoModelForSequenceClassification",
    "gpt2": "AutoModelForCausalLM",
    "llama": "AutoModelForCausalLM",
    "phi3": "AutoModelForCausalLM",
    "vit": "AutoModelForImageClassification",
    "t5": "AutoModelForSeq2SeqLM",
    "clip": "AutoModel",
}

SCRIPT = """
    import json, os, sys
    from pathlib import Path
    {plugin}
    import torch, transformers
    from hand_pruned import FAMILIES, outputs
    found = {{}}
    for folder in sorted(Path(sys.argv[1]).iterdir()):
        auto = getattr(transformers, json.loads(sys.argv[2])[folder.name])
        model = auto.from_pretrained(folder, trust_remote_code={trust})
        native = type(model).__module__.startswith("transformers.")
        difference = (outputs(model, FAMILIES[folder.name].inputs) - torch.load(folder / "outputs.pt")).abs().max()
        found[folder.name] = [difference.item(), type(model).__name__, native]
        model.save_pretrained(sys.argv[3] + "/" + folder.name)
    print(json.dumps(found))
    """


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Ragged models with their code beside them, and the outputs that they must give."""
    folder = tmp_path_factory.mktemp("saved")
    names = {}
    for family in AUTO:
        model = ragged(family, mlp=[40, 36], heads=[3, 3] if family == "t5" else [3, 2])
        model.save_pretrained(folder / family)
        write_remote_code(folder / family, model)
        torch.save(outputs(model, FAMILIES[family].inputs), folder / family / "outputs.pt")
        names[family] = type(model).__name__
    return folder, names


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plugin", "trust"),
    [
        ("sys.modules['hf_subprune'] = None", True),
        ("import hf_subprune.loading", True),
        ("import hf_subprune.loading", False),
    ],
)
def test_same_outputs_without_hf_subprune_and_with_it(saved, plugin, trust, tmp_path, monkeypatch):
    folder, names = saved
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    script = SCRIPT.format(plugin=plugin, trust=trust)
    found, _ = run_fresh(script, folder, json.dumps(AUTO), tmp_path / "again")
    assert {family: max(difference, 1e-5) for family, (difference, *_) in found.items()} == dict.fromkeys(AUTO, 1e-5)
    assert {family: rest for family, (_, *rest) in found.items()} == {
        f: [name, not trust] for f, name in names.items()
    }
    for family in AUTO:
        config = json.loads((tmp_path / "again" / family / "config.json").read_text())
        assert config["architectures"] == [names[family]]
        before, after = (load_file(path / family / "model.safetensors") for path in (folder, tmp_path / "again"))
        assert before.keys() == after.keys() and all(torch.equal(after[name], before[name]) for name in before)
        assert config["subprune"]["library"] == "hf_subprune"
        assert (tmp_path / "again" / family / "modeling_subprune.py").exists()
        assert "trust_remote_code=True" in config["transformers_weights"]
        if not trust:
            again = getattr(tf, names[family]).from_pretrained(tmp_path / "again" / family)
            expected = torch.load(folder / family / "outputs.pt")
            torch.testing.assert_close(outputs(again, FAMILIES[family].inputs), expected)


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """A place of its own for the code that transformers copies before it imports it."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))


@pytest.mark.parametrize("family", ["bert", "vit"])
def test_the_model_inside_loads_alone(saved, modules, family):
    """The files of ViT keep names that transformers translates while it loads."""
    folder, _ = saved
    encoder = tf.AutoModel.from_pretrained(folder / family, trust_remote_code=True, add_pooling_layer=False)
    assert (40,) in {parameter.shape for parameter in encoder.parameters()}
    native = tf.AutoModel.from_pretrained(folder / family, add_pooling_layer=False)
    assert type(encoder) is not type(native)
    assert_same_weights(encoder, native)
    torch.testing.assert_close(outputs(encoder, FAMILIES[family].inputs), outputs(native, FAMILIES[family].inputs))


def test_a_model_from_its_config_has_the_pruned_widths_and_is_initialised(saved, modules):
    folder, _ = saved
    config = tf.AutoConfig.from_pretrained(folder / "llama")
    model = tf.AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    assert model.model.layers[1].mlp.down_proj.weight.shape == (32, 36)
    assert torch.isfinite(outputs(model, TOKENS)).all()


def test_a_model_from_remote_code_is_pruned_again(saved, modules, tmp_path):
    folder, _ = saved
    model = tf.AutoModelForCausalLM.from_pretrained(folder / "llama", trust_remote_code=True)
    layer = model.model.layers[0].mlp
    for linear in (layer.gate_proj, layer.up_proj):
        linear.weight = torch.nn.Parameter(linear.weight.detach()[:30].clone())
        linear.out_features = 30
    layer.down_proj.weight = torch.nn.Parameter(layer.down_proj.weight.detach()[:, :30].clone())
    layer.down_proj.in_features = 30
    assert choose_layout(model, "auto", inputs=TOKENS).kind == "ragged"
    model.save_pretrained(tmp_path / "again")
    write_remote_code(tmp_path / "again", model)
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert_same_weights(again, model)
    torch.testing.assert_close(outputs(again, TOKENS), outputs(model, TOKENS))


def test_every_class_of_the_config_is_there():
    classes = auto_classes(FAMILIES["bert"].build().config)
    assert classes["AutoModel"] is tf.BertModel
    assert classes["AutoModelForTokenClassification"] is tf.BertForTokenClassification
    assert "AutoModelForSeq2SeqLM" not in classes


def test_stock_and_unsaved_models_are_refused(tmp_path):
    model = FAMILIES["bert"].pruned(mlp=[40, 40])
    with pytest.raises(ValueError, match="holds no ragged model: call save_pretrained"):
        write_remote_code(tmp_path, model)
    choose_layout(model, "auto", inputs=TOKENS)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a model with the stock layout needs no remote code"):
        write_remote_code(tmp_path, model)
    assert not (tmp_path / "modeling_subprune.py").exists()


def test_models_that_need_code_of_their_own_are_refused(tmp_path):
    model = ragged("bert")
    model.config.auto_map = {"AutoModel": "modeling_other.OtherModel"}
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"comes from remote code itself \(modeling_other\.OtherModel\)"):
        write_remote_code(tmp_path, model)


def test_a_class_that_is_not_part_of_transformers_is_refused_by_name(tmp_path):
    model = ragged("bert")
    own = type("Own", (tf.PreTrainedModel,), {"__module__": "script"})
    model.save_pretrained(tmp_path)
    before = (tmp_path / "config.json").read_text()
    with pytest.raises(ValueError, match="Own is defined in 'script', not in transformers"):
        write_remote_code(tmp_path, object.__new__(own))
    assert (tmp_path / "config.json").read_text() == before
