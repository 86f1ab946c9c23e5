import pytest
import torch
from fresh import ragged
from hand_pruned import FAMILIES

from hf_subprune.serving.export import export

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def stock():
    model = FAMILIES["bert"].pruned(mlp=[40, 40])
    model.config.intermediate_size = 40
    return model


@pytest.mark.parametrize(
    "build",
    [
        pytest.param(lambda: stock(), id="stock"),
        pytest.param(lambda: ragged("bert"), id="ragged"),
        pytest.param(lambda: ragged("llama"), id="llama", marks=pytest.mark.slow),
        pytest.param(lambda: ragged("vit"), id="vit", marks=pytest.mark.slow),
    ],
)
def test_onnx_runtime_gives_the_same_outputs(build, tmp_path):
    model = build()
    model.save_pretrained(tmp_path / "model")
    session = onnxruntime.InferenceSession(export(tmp_path / "model", "onnx", tmp_path / "model.onnx"))
    names = [given.name for given in session.get_inputs()]
    (family,) = (name for name, family in FAMILIES.items() if type(family.build()) is type(model))
    for rows in (1, 2):
        inputs = {name: value[:rows] for name, value in FAMILIES[family].inputs.items()}
        for name in names:
            if name.endswith("attention_mask"):
                inputs[name] = torch.ones_like(inputs[name.replace("attention_mask", "input_ids")])
            elif name == "token_type_ids":
                inputs[name] = torch.zeros_like(inputs["input_ids"])
        with torch.no_grad():
            expected = model(**inputs).logits
        found = session.run(["logits"], {name: inputs[name].numpy() for name in names})[0]
        torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-5, rtol=1e-4)


def test_what_torch_cannot_export_is_refused_with_its_reason(tmp_path, monkeypatch):
    ragged("bert").save_pretrained(tmp_path / "model")

    def fail(*_, **__):
        raise RuntimeError("no decomposition")

    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(ValueError, match="BertForSequenceClassification cannot be exported to ONNX: no decomposition"):
        export(tmp_path / "model", "onnx", tmp_path / "model.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
