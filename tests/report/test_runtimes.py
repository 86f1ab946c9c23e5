import pytest
from sample_report import make_block, make_report

from hf_subprune.report.runtimes import runtime_table


def rows(**changes):
    _, _, *lines = runtime_table(make_report(**changes), "me/small").splitlines()
    return {cells[1].strip().split(",")[0]: (cells[2], cells[3]) for cells in (line.split("|") for line in lines)}


def test_an_encoder_is_for_transformers_and_onnx():
    found = rows()
    assert found.keys() == {"Transformers", "ONNX Runtime"} and "as it is" in found["Transformers"][0]
    assert "hf-subprune export me/small --to onnx --out small.onnx" in found["ONNX Runtime"][1]


@pytest.mark.parametrize(
    ("architecture", "layout", "gguf", "vllm"),
    [
        ("LlamaForCausalLM", "stock", "--to gguf --out small.gguf", "vllm serve me/small"),
        ("Gemma2ForCausalLM", "stock", "", "vllm serve me/small"),
        ("LlamaForCausalLM", "ragged", "--to gguf --out small.gguf", "--to vllm --out small-vllm"),
        ("Qwen3ForCausalLM", "ragged", "", ""),
    ],
)
def test_a_language_model_has_the_command_for_each_runtime_that_takes_it(architecture, layout, gguf, vllm):
    found = rows(architecture=architecture, layout=layout)
    for name, command in (("llama.cpp", gguf), ("vLLM", vllm)):
        assert command in found[name][1] and bool(found[name][1].strip()) == bool(command)
    assert ("trust_remote_code=True" in found["Transformers"][0]) == (layout == "ragged")
    assert f"`transformers serve me/small{' --trust-remote-code' * (layout == 'ragged')}`" in found["Transformers"][1]


def test_query_heads_that_differ_by_layer_are_not_for_vllm():
    blocks = tuple(make_block(f"layers.{i}.attn", units_after=8 * (i + 1)) for i in range(2))
    assert (
        "as many query heads in each layer"
        in rows(architecture="LlamaForCausalLM", layout="ragged", blocks=blocks)["vLLM"][0]
    )
