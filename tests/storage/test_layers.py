import json

import pytest
import torch
from fresh import run_fresh
from same import assert_same_weights
from tiny import tiny

from hf_subprune.discovery.discover import discover
from hf_subprune.discovery.probe_inputs import probe_inputs
from hf_subprune.storage.layout import choose_layout
from hf_subprune.storage.remote_code import write_remote_code
from hf_subprune.surgery.edits import shrink, undo_all

PLAIN = """
    import json, sys
    {plugin}
    import torch, transformers
    model = getattr(transformers, sys.argv[2]).from_pretrained(sys.argv[1], trust_remote_code={trust}).eval()
    inputs = torch.load(sys.argv[1] + "/inputs.pt")
    with torch.no_grad():
        found = model(**inputs)[0]
    print(json.dumps((found - torch.load(sys.argv[1] + "/outputs.pt")).abs().max().item()))
    """


THREE = {"gpt2": {"n_layer": 3}, "whisper": {}}


def three_layers(family):
    return tiny(family, **THREE.get(family, {"num_hidden_layers": 3}))


def without_layers(model, *layers, bias=0.0):
    """A model whose blocks in some layers are gone; biases that are left have one value. And the edits."""
    blocks = [b for b in discover(model).blocks if any(layer in f"{b.name}." for layer in layers)]
    edits = {}
    for block in blocks:
        own = model.get_submodule(block.consumer).bias
        edits[block.name] = shrink(model, block, [], bias=None if own is None else torch.full_like(own, bias))
    return model, edits


def output(model):
    with torch.no_grad():
        return model(**probe_inputs(model))[0]


@pytest.mark.parametrize(
    ("family", "layers", "values"),
    [
        ("llama", ["layers.0."], {"num_hidden_layers": 2}),
        ("gpt2", ["h.1."], {"n_layer": 2}),
        ("gemma2", ["layers.0."], {"num_hidden_layers": 2, "layer_types": ["full_attention", "sliding_attention"]}),
        ("gemma2", ["layers.0.", "layers.2."], {"num_hidden_layers": 1, "layer_types": ["full_attention"]}),
        ("whisper", ["decoder.layers.1."], {"encoder_layers": 2, "decoder_layers": 1}),
        ("vit", ["layers.1."], {"num_hidden_layers": 2}),
    ],
)
def test_idle_layers_go_and_the_config_says_how_many_are_left(family, layers, values, tmp_path):
    model, edits = without_layers(three_layers(family), *layers)
    expected, whole = output(model), three_layers(family)
    chosen = choose_layout(model, "stock", inputs=probe_inputs(model))
    assert {name: getattr(model.config, name) for name in values} == values
    assert all(name in chosen.reason for name in values if name == "num_hidden_layers")
    torch.testing.assert_close(output(model), expected)
    model.save_pretrained(tmp_path)
    assert "subprune" not in json.loads((tmp_path / "config.json").read_text())
    again = type(model).from_pretrained(tmp_path).eval()
    assert_same_weights(again, model)
    assert [getattr(m, "layer_idx", None) for m in again.modules()] == [
        getattr(m, "layer_idx", None) for m in model.modules()
    ]
    chosen.undo()
    torch.testing.assert_close(output(model), expected)
    undo_all(edits)
    assert_same_weights(model, whole)
    assert model.config.to_dict() == whole.config.to_dict()


@pytest.mark.parametrize(
    ("family", "layer", "bias"),
    [("bert", "layer.1.", 0.0), ("bart", "decoder.layers.1.", 0.0), ("gpt2", "h.1.", 0.5)],
)
def test_layers_that_still_change_what_they_are_given_stay(family, layer, bias):
    model, _ = without_layers(tiny(family), layer, bias=bias)
    layers, expected = str(model), output(model)
    assert choose_layout(model, "auto", inputs=probe_inputs(model)).kind == "ragged"
    assert str(model) == layers
    torch.testing.assert_close(output(model), expected)
    with pytest.raises(ValueError, match="layout='stock' is not possible"):
        choose_layout(model, "stock", inputs=probe_inputs(model))
    assert str(model) == layers


def test_layers_stay_where_others_are_ragged_or_that_is_asked_for():
    model, _ = without_layers(three_layers("llama"), "layers.0.", "layers.1.mlp.")
    assert choose_layout(model, "auto", inputs=probe_inputs(model)).kind == "ragged"
    assert len(model.model.layers) == 3 and model.config.num_hidden_layers == 3
    model, _ = without_layers(three_layers("llama"), "layers.0.")
    assert choose_layout(model, "ragged", inputs=probe_inputs(model)).kind == "ragged"
    assert len(model.model.layers) == 3 and [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plugin", "trust"), [("sys.modules['hf_subprune'] = None", True), ("import hf_subprune", False)]
)
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5"])
def test_a_model_without_blocks_loads_in_another_process(family, plugin, trust, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    model, _ = without_layers(tiny(family), *{"t5": ["DenseReluDense."]}.get(family, ["0.", "1.mlp"]), bias=0.5)
    choose_layout(model, "ragged", inputs=probe_inputs(model))
    model.save_pretrained(tmp_path / "saved")
    write_remote_code(tmp_path / "saved", model)
    torch.save(probe_inputs(model), tmp_path / "saved" / "inputs.pt")
    torch.save(output(model), tmp_path / "saved" / "outputs.pt")
    auto = {
        "bert": "AutoModelForSequenceClassification",
        "t5": "AutoModelForSeq2SeqLM",
    }.get(family, "AutoModelForCausalLM")
    difference, _ = run_fresh(PLAIN.format(plugin=plugin, trust=trust), tmp_path / "saved", auto)
    assert difference < 1e-5
