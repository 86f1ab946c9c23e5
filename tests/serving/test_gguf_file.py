import pytest
import torch
import transformers as tf
from served import PROMPT, TEXT, LlamaCpp, byte_level, causal_lm, greedy
from tiny import tiny

from hf_subprune import PruneConfig, prune
from hf_subprune.serving.export import export

gguf = pytest.importorskip("gguf")
PIECES = [TEXT[start : start + 120] for start in range(0, len(TEXT) - 120, 30)]
SMALL = {"samples": 16, "held_out": 4, "batch_size": 4, "max_length": 32, "loss_aware": False}
RAGGED = {"keep": 0.7, "layout": "ragged", "budget": "global"}
QWEN = (tf.Qwen2ForCausalLM, tf.Qwen2Config)
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def saved(model, folder, **config):
    """A pruned model and its tokenizer in a folder."""
    tokenizer = byte_level()
    prune(model, PIECES, PruneConfig(**SMALL, **config), tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def metadata(path):
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def the_same_in_llama_cpp(folder, out):
    """Export, compare what llama.cpp and Transformers make of a prompt, and return what the file says.

    Of weights in half precision llama.cpp rounds other numbers than torch does, so that near ties go either way.
    """
    pytest.importorskip("xllamacpp")
    prompt = byte_level()(PROMPT)["input_ids"]
    model = tf.AutoModelForCausalLM.from_pretrained(folder)
    exact = model.dtype == torch.float32
    runtime = LlamaCpp(export(folder, "gguf", out))
    with torch.no_grad():
        expected = model(torch.tensor([prompt])).logits[0, -1].float().log_softmax(-1)
    limit = 1e-4 if exact else 0.2
    torch.testing.assert_close(runtime.log_probabilities(prompt), expected, atol=limit, rtol=0)
    if exact:
        assert runtime.greedy(PROMPT) == runtime.greedy(prompt) == greedy(model, prompt)
    return metadata(out)


def test_a_stock_llama_gives_the_same_tokens(tmp_path):
    folder = saved(causal_lm(), tmp_path / "model", keep=0.6)
    said = the_same_in_llama_cpp(folder, tmp_path / "model.gguf")
    assert said["general.architecture"] == "llama" and type(said["llama.feed_forward_length"]) is int
    assert said["tokenizer.chat_template"].startswith("{% for m in messages %}")


def test_a_ragged_llama_gives_the_same_tokens(tmp_path):
    folder = saved(causal_lm(), tmp_path / "model", **RAGGED)
    said = the_same_in_llama_cpp(folder, tmp_path / "model.gguf")
    assert said["general.architecture"] == "deci" and len(set(said["deci.feed_forward_length"])) > 1


def test_a_llama_that_lost_sublayers_gives_the_same_tokens(tmp_path):
    gone = ("*.0.mlp", "*.1.self_attn", "*.layers.2.*", "*.3.mlp")
    folder = saved(causal_lm(), tmp_path / "model", keep=1.0, remove=gone, layout="ragged")
    said = the_same_in_llama_cpp(folder, tmp_path / "model.gguf")
    assert said["deci.block_count"] == 3
    assert said["deci.attention.head_count"] == [6, 0, 6] and said["deci.attention.head_count_kv"] == [3, 0, 3]
    # An MLP that is gone beside attention is some neurons of zeros: `deci` skips the attention of a layer without.
    assert said["deci.feed_forward_length"] == [32, 96, 32]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "options", "name"),
    [
        (lambda: causal_lm(tie_word_embeddings=True), RAGGED, "deci"),
        (lambda: causal_lm().bfloat16(), RAGGED, "deci"),
        (lambda: causal_lm().half(), {"keep": 0.6}, "llama"),
        (lambda: causal_lm(rope_parameters=LLAMA3), RAGGED, "deci"),
        (lambda: causal_lm(attention_bias=True, mlp_bias=True), RAGGED, "deci"),
        (lambda: causal_lm(tf.MistralForCausalLM, tf.MistralConfig, sliding_window=None), RAGGED, "deci"),
        (lambda: causal_lm(*QWEN), RAGGED, "deci"),
        (lambda: causal_lm(*QWEN), {"keep": 0.6}, "qwen2"),
        (lambda: causal_lm(tf.Qwen3ForCausalLM, tf.Qwen3Config), {"keep": 0.6}, "qwen3"),
    ],
    ids=["tied", "bfloat16", "float16", "llama3", "biases", "mistral", "qwen2-ragged", "qwen2", "qwen3"],
)
def test_other_models_give_the_same_tokens(model, options, name, tmp_path):
    folder = saved(model(), tmp_path / "model", **options)
    assert the_same_in_llama_cpp(folder, tmp_path / "model.gguf")["general.architecture"] == name


def test_weights_keep_their_dtype(tmp_path):
    folder = saved(causal_lm().bfloat16(), tmp_path / "model", **RAGGED)
    reader = gguf.GGUFReader(export(folder, "gguf", tmp_path / "model.gguf"))
    assert {tensor.tensor_type.name for tensor in reader.tensors if len(tensor.shape) > 1} == {"BF16"}


def test_the_tokenizer_of_another_file_is_taken_over(tmp_path):
    folder = saved(causal_lm(), tmp_path / "model", keep=0.6)
    original = export(folder, "gguf", tmp_path / "original.gguf")
    (folder / "tokenizer.json").unlink()
    said, before = metadata(export(folder, "gguf", tmp_path / "like.gguf", like=original)), metadata(original)
    names = {name for name in before if name.startswith("tokenizer.")}
    assert len(names) > 5 and {name: said[name] for name in names} == {name: before[name] for name in names}
    causal_lm(vocab_size=300).save_pretrained(folder)
    with pytest.raises(ValueError, match="given with --like has 400 tokens, this model has 300"):
        export(folder, "gguf", tmp_path / "other.gguf", like=original)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (
            lambda: causal_lm(tf.Qwen3ForCausalLM, tf.Qwen3Config),
            RAGGED,
            "k_norm.weight is not in both .* layout='stock'",
        ),
        (lambda: causal_lm(tf.GraniteForCausalLM, tf.GraniteConfig), RAGGED, "gives other logits than Llama"),
        (
            lambda: causal_lm(tf.MistralForCausalLM, tf.MistralConfig, sliding_window=16),
            {"keep": 0.6},
            "looks back on 16 tokens only .*convert_hf_to_gguf.py",
        ),
        (lambda: tiny("gpt2"), None, "is built otherwise than Llama .*convert_hf_to_gguf.py"),
        (lambda: tiny("bert"), None, "only causal language models"),
    ],
)
def test_what_llama_cpp_has_no_form_for_is_refused_with_the_reason(model, options, message, tmp_path):
    model = model()
    if options is None:
        model.save_pretrained(tmp_path / "model")
    else:
        saved(model, tmp_path / "model", **options)
    with pytest.raises(ValueError, match=f"cannot be exported to GGUF: .*{message}"):
        export(tmp_path / "model", "gguf", tmp_path / "model.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
