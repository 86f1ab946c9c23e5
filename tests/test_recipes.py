"""Every recipe, on a little of its data."""

import importlib
import json
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import soundfile
import torch
from batches import ready_batches
from speech import make_processor, sounds, tiny_whisper, write_sounds
from tiny import tiny
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    WhisperForConditionalGeneration,
)
from typer.testing import CliRunner

from hf_subprune import PruneConfig, prune
from hf_subprune.cli import app
from hf_subprune.data.datafiles import load_data
from hf_subprune.demo import docstrings

RECIPES = Path(__file__).parent.parent / "recipes"


LANGUAGE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
SMALL = {
    "causal_lm": lambda vocabulary: LlamaForCausalLM(
        LlamaConfig(vocab_size=vocabulary, intermediate_size=24, **LANGUAGE | {"num_hidden_layers": 2})
    ),
    "moe": lambda vocabulary: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=vocabulary,
            moe_intermediate_size=32,
            num_experts=8,
            num_experts_per_tok=2,
            head_dim=4,
            output_router_logits=True,
            **LANGUAGE,
        )
    ),
    "resnet_digits": lambda: ResNetForImageClassification(
        ResNetConfig(num_channels=1, embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1], num_labels=10)
    ),
    "vit_digits": lambda: ViTForImageClassification(
        ViTConfig(
            image_size=8,
            patch_size=4,
            num_channels=1,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_labels=10,
        )
    ),
}
"""By recipe, its model made smaller."""


@pytest.fixture
def recipe(monkeypatch):
    """Import a recipe by its name, with its folder on the path, as when it is run; its own model is small."""
    monkeypatch.syspath_prepend(RECIPES)

    def smaller(name):
        module = importlib.import_module(name)
        if name in SMALL:
            monkeypatch.setattr(module, "make_model", SMALL[name])
        if hasattr(module, "docstrings"):
            monkeypatch.setattr(module, "docstrings", lambda count, offset=0: docstrings(min(count, 200), offset))
        return module

    return smaller


@pytest.fixture
def encoder(recipe, tmp_path):
    """Folder of a tiny encoder that knows the docstrings' words."""
    tokenizer = recipe("missing_word").make_tokenizer(docstrings(60))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(tmp_path / "encoder")
    tokenizer.save_pretrained(tmp_path / "encoder")
    return str(tmp_path / "encoder")


def test_the_list_of_recipes_is_complete():
    listed = set(re.findall(r"\(([\w/]+\.(?:py|yaml))\)", (RECIPES / "README.md").read_text(encoding="utf-8")))
    files = (path for pattern in ("*.py", "*.yaml") for path in RECIPES.rglob(pattern))
    assert listed == {path.relative_to(RECIPES).as_posix() for path in files}


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_is_valid_and_says_its_command(path):
    PruneConfig.from_pretrained(path)
    assert f"--config recipes/{path.name}" in path.read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "family"),
    [("half", "bert"), ("sentence_encoder", "bert"), ("causal_lm", "llama"), ("speech", "whisper")],
)
def test_a_config_prunes_what_it_is_for(name, family):
    config = PruneConfig.from_pretrained(RECIPES / f"{name}.yaml")
    model = tiny(family)
    report = prune(model, ready_batches(model), replace(config, samples=20, held_out=4, batch_size=4))
    assert report.parameters.ratio < 1 and report.macs.ratio < 0.99


@pytest.mark.slow
def test_a_sentence_encoder_is_pruned_in_three_ways(recipe, encoder, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["--model", encoder, "--samples", "16", "--unseen", "12", "--out", str(out)]
    rows = recipe("sentence_encoder").main(arguments)
    assert [row["parameters"] < 1 for row in rows] == [True] * 3
    assert rows[1]["MACs"] < rows[0]["MACs"]
    assert "embedding_cosine" in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {"neurons", "neurons-and-heads", "both-each-layer-its-own"}


@pytest.mark.slow
def test_a_classifier_is_scored_by_a_metric_module(recipe):
    pytest.importorskip("evaluate")
    arguments = ["--steps", "4", "--samples", "16", "--paragraphs", "60", "--test", "20", "--keep", "0.75", "0.5"]
    arguments += ["--resamples", "20"]
    rows = recipe("text_classifier").main(arguments)
    assert [(row["keep"], row["metric"]) for row in rows] == [(0.75, "accuracy"), (0.5, "accuracy")]
    assert rows[0]["parameters"] > rows[1]["parameters"]


@pytest.mark.slow
def test_a_language_model_loses_parameters_and_keeps_a_perplexity(recipe, capsys):
    rows = recipe("causal_lm").main(["--steps", "2", "--samples", "16", "--unseen", "8"])
    assert [row["chosen by"] for row in rows] == list(recipe("causal_lm").WAYS)
    assert len({row["parameters"] for row in rows}) == 1
    assert "95% intervals" in capsys.readouterr().out


@pytest.mark.slow
def test_a_mixture_of_experts_loses_neurons_and_experts(recipe, capsys):
    rows = recipe("moe").main(["--steps", "2", "--samples", "16", "--unseen", "8"])
    ways = list(recipe("moe").WAYS)
    assert [(row["removed"], row["weights"]) for row in rows] == [(way, w) for way in ways for w in ("new", "old")]
    assert all(row["parameters"] < 1 and row["layout"] == "stock" for row in rows)
    assert all(one["parameters"] == other["parameters"] for one, other in zip(rows[::2], rows[1::2], strict=True))
    assert "95% intervals" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "words"), [("moe", ["--steps", "2", "--unseen", "8"]), ("resnet_digits", ["--epochs", "1"])]
)
def test_a_saved_original_is_benched_as_the_recipe_says(recipe, tmp_path, monkeypatch, name, words):
    module = recipe(name)
    (command,) = re.findall(r"^    hf-subprune (bench quality (?:.*\\\n)*.*)$", module.__doc__, flags=re.MULTILINE)
    arguments = shlex.split(command.replace("\\\n", ""))
    monkeypatch.chdir(tmp_path)
    module.main([*words, "--samples", "8", "--save", arguments[2]])
    fewer = ["--samples", "8", "--importance", "greedy", "--variant", "layer", "--out", "."]
    result = CliRunner().invoke(app, [*arguments, *fewer], catch_exceptions=False)
    assert result.exit_code == 0
    rows = json.loads(Path("quality.json").read_text())
    assert [row["reweight"] for row in rows] == [True, False]
    (metric,) = rows[0]["metrics"].values()
    assert metric["split"] == "" and metric["dataset"] == "test" and metric["samples"] >= 8


@pytest.mark.slow
def test_digits_are_read_by_smaller_transformers(recipe):
    rows = recipe("vit_digits").main(["--epochs", "1", "--samples", "16", "--keep", "0.5"])
    assert [row["widths"] for row in rows] == ["alike", "each its own"]
    assert all(row["MACs"] == pytest.approx(0.5, abs=0.05) for row in rows)


@pytest.mark.slow
def test_channels_of_a_resnet_are_pruned_with_and_without_new_weights(recipe):
    rows = recipe("resnet_digits").main(["--epochs", "1", "--samples", "16", "--keep", "0.5"])
    assert [row["pruned"].partition(",")[0] for row in rows] == ["new weights"] * 3 + ["old weights"]
    assert len({row["parameters"] for row in rows}) == 1 and rows[0]["parameters"] < 0.9


@pytest.mark.slow
def test_whisper_is_pruned_on_a_folder_of_speech(recipe, tmp_path, capsys):
    tiny_whisper().save_pretrained(tmp_path / "model")
    make_processor().save_pretrained(tmp_path / "model")
    write_sounds(tmp_path / "spoken", sounds(8), recipe("whisper").sentences(8))
    folders = [
        "--model",
        str(tmp_path / "model"),
        "--speech",
        str(tmp_path / "spoken"),
        "--save",
        str(tmp_path / "out"),
    ]
    rows = recipe("whisper").main(
        [*folders, "--samples", "4", "--held-out", "2", "--test", "2", "--keep", "0.85", "--only", "default"]
    )
    assert [(row["keep"], row["layout"]) for row in rows] == [(0.85, "stock")]
    assert "side by side" in capsys.readouterr().out
    assert WhisperForConditionalGeneration.from_pretrained(tmp_path / "out").num_parameters() > 0


@pytest.mark.skipif(shutil.which("flite") is None, reason="there is no flite to speak")
def test_sentences_are_spoken_in_four_voices(recipe, tmp_path):
    whisper = recipe("whisper")
    whisper.speak(tmp_path, whisper.sentences(4))
    rows = list(load_data(str(tmp_path)))
    assert [row["text"] for row in rows] == whisper.sentences(4) and len(set(whisper.sentences(100))) == 100
    assert all(soundfile.info(row["audio"]).samplerate == 16_000 for row in rows)


def test_a_pruned_model_is_quantized(recipe, encoder):
    pytest.importorskip("torchao")
    rows = recipe("quantize").main(["--model", encoder, "--samples", "16", "--unseen", "8"])
    size = {row["model"]: row["MB"] for row in rows}
    assert size["pruned, then quantized"] < min(size["pruned"], size["quantized"]) < size["original"]


@pytest.mark.slow
def test_adapters_on_a_pruned_model_are_saved_and_loaded(recipe):
    pytest.importorskip("peft")
    arguments = ["--steps", "4", "--lora-steps", "4", "--samples", "16", "--paragraphs", "60", "--test", "20"]
    pruned, tuned = recipe("lora").main(arguments)
    assert pruned["parameters"] == tuned["parameters"]
    assert 0 == pruned["trained"] < tuned["trained"] < tuned["parameters"]


@pytest.mark.slow
def test_onnx_runtime_computes_what_torch_does(recipe, encoder, tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    arguments = ["--model", encoder, "--samples", "16", "--out", str(tmp_path / "out")]
    original, pruned = recipe("export_onnx").main(arguments)
    assert pruned["MB"] < original["MB"]
    assert max(row["largest difference from torch"] for row in (original, pruned)) < 1e-4


@pytest.mark.slow
def test_a_checkpoint_larger_than_memory_is_pruned_and_runs(recipe, tmp_path):
    arguments = ["--shape", "tiny", "--folder", str(tmp_path), "--samples", "6", "--length", "16"]
    row = recipe("llama_7b_offload").main(arguments)
    assert row["of the original"] < 0.9
    assert row["finite logits"]


@pytest.mark.slow
def test_the_script_for_gpus_runs_on_a_cpu_too(recipe):
    arguments = ["--shape", "tiny", "--device", "cpu", "--samples", "8", "--length", "16"]
    tables = recipe("on_gpu").main(arguments)
    first, second = tables["models"]
    assert first["model, GB"] == second["model, GB"]
    assert all(row["of the original"] < 0.9 for row in tables["models"])
    assert {row["problem"] for row in tables["solver"]} >= {"synthetic 160x64", "alike 160x64"}


# Beside other methods


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """Folder of a tiny language model that knows the docstrings' words."""
    folder = tmp_path_factory.mktemp("llama")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(RECIPES)
        tokenizer = importlib.import_module("missing_word").make_tokenizer(docstrings(300))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=60,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


SHORT = ["--draws", "1", "--samples", "8", "--length", "16", "--keep", "0.8"]


@pytest.mark.slow
def test_a_language_model_is_pruned_beside_other_methods(recipe, llama, capsys):
    rows = recipe("smollm2").main(["--model", llama, *SHORT])
    plain = {row["pruned"]: row["loads plainly"] for row in rows}
    assert plain == dict.fromkeys(recipe("smollm2").WAYS, True) | {"ragged": False, "flap": False, "osscar": True}
    assert all(0.7 < row["blocks' parameters"] <= 0.8 for row in rows)
    assert all(0.9 < row["least"] <= row["perplexity / dense"] <= row["most"] < 1.5 for row in rows)
    assert all(0.9 < row["within the text"] < 1.5 and row["within the text"] != row["most"] for row in rows)
    printed = capsys.readouterr().out
    assert "that of the original is" in printed and "What follows, at temperature 0" in printed


@pytest.mark.slow
def test_a_language_model_is_pruned_on_its_own_and_on_another_text(recipe, llama, tmp_path):
    (tmp_path / "other.txt").write_text("\n".join(docstrings(60)))
    figures = [
        recipe("smollm2").main(["--model", llama, *SHORT, "--only", "neurons", *words])[0]["perplexity / dense"]
        for words in ([], ["--data-free"], ["--calibrate", str(tmp_path / "other.txt")], ["--generated", "4"])
    ]
    assert len(set(figures)) == 4


@pytest.mark.slow
def test_the_original_is_distilled_into_a_pruned_language_model(recipe, llama):
    (row,) = recipe("smollm2").main(["--model", llama, *SHORT, "--only", "wanda", "--recover", "2"])
    assert row["recovered / dense"] == pytest.approx(row["perplexity / dense"], rel=0.05)  # it has learned nothing yet
    assert row["CPU seconds of recovery"] > 0


def test_flap_removes_what_fluctuates_least_and_leaves_its_mean(recipe):
    smollm2 = recipe("smollm2")
    model, original = tiny("llama"), tiny("llama")
    windows = torch.randint(3, 120, (4, 16), generator=torch.Generator().manual_seed(0))
    for each in (model, original):  # what one key/value group says hardly changes
        with torch.no_grad():
            each.model.layers[0].self_attn.v_proj.weight[8:16] *= 0.1
    smollm2.flap(model, smollm2.Calibration(windows, windows), smollm2.in_blocks(model) // 2)
    assert 0.4 < smollm2.in_blocks(model) / smollm2.in_blocks(original) <= 0.5  # with its biases
    attention = model.model.layers[0].self_attn
    values = original.model.layers[0].self_attn.v_proj.weight.view(3, 8, -1)
    left = [
        group
        for group in range(3)
        if any(torch.equal(values[group], v) for v in attention.v_proj.weight.view(-1, 8, 48))
    ]
    assert 1 not in left and attention.o_proj.in_features == 16 * len(left)
    outputs = []
    for each in (model, original):
        each.model.layers[0].self_attn.o_proj.register_forward_hook(lambda _m, _i, output: outputs.append(output))
        with torch.no_grad():
            each(windows)
    pruned, whole = outputs
    assert not torch.allclose(pruned, whole, atol=1e-3)
    pruned, whole = (output[:, 1:].mean((0, 1)) for output in outputs)  # of all tokens but first ones
    torch.testing.assert_close(pruned, whole, rtol=1e-4, atol=1e-5)


def test_osscar_leaves_least_squares_weights_in_layers_of_one_width(recipe):
    smollm2 = recipe("smollm2")
    model, original = tiny("llama"), tiny("llama")
    windows = torch.randint(3, 120, (6, 16), generator=torch.Generator().manual_seed(0))
    inputs = []
    hook = original.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        original(windows)
    hook.remove()
    smollm2.osscar(model, smollm2.Calibration(windows, windows), int(0.8 * smollm2.in_blocks(model)))
    assert smollm2.in_blocks(model) <= 0.8 * smollm2.in_blocks(original)
    assert {layer.mlp.down_proj.in_features for layer in model.model.layers} == {model.config.intermediate_size}
    before, after = original.model.layers[0].mlp, model.model.layers[0].mlp
    kept = [int((before.up_proj.weight == row).all(1).nonzero()) for row in after.up_proj.weight]
    B, W = inputs[0].flatten(0, 1).double(), before.down_proj.weight.T.double()
    H = B.T @ B + 0.01 * B.square().sum(0).mean() * torch.eye(len(W))
    V = torch.linalg.solve(H[kept][:, kept], (H @ W)[kept])
    torch.testing.assert_close(after.down_proj.weight.T.double(), V, rtol=1e-4, atol=1e-4)


# Gradual pruning


def test_gaps_hide_the_word_and_label_it(recipe):
    task = recipe("missing_word")
    tokenizer = task.make_tokenizer(["return the value of the key in a mapping", "is it a key or the value"] * 3)
    (first, *others) = task.gaps(["Return the value of a key"], tokenizer)
    assert [task.WORDS[gap["labels"]] for gap in (first, *others)] == ["the", "of", "a"]
    tokens = tokenizer.convert_ids_to_tokens(first["input_ids"])
    assert tokens[0] == "[CLS]" and tokens[1 + task.CONTEXT] == "[MASK]"
    assert tokens[task.CONTEXT] == "return" and tokens[2 + task.CONTEXT] == "value"
    assert len(tokens) == 2 * task.CONTEXT + 2
    assert first["attention_mask"] == [int(token != "[PAD]") for token in tokens]


@pytest.mark.slow
@pytest.mark.parametrize("pretrained", [False, True])
def test_all_ways_reach_the_same_size(recipe, encoder, capsys, pretrained):
    gradual = recipe("gradual_pruning")
    arguments = ["--seeds", "2", "--steps", "4", "--original-steps", "4", "--samples", "16", "--paragraphs", "60"]
    arguments += ["--pretrained", encoder] if pretrained else []
    for results in gradual.main([*arguments, "--validate"]):
        sizes = {results[way]["parameters"] for way in (*gradual.ONE_SHOT, "gradual")}
        assert len(sizes) == 1 and sizes.pop() < results["whole"]["parameters"]
        assert all(0 <= row["accuracy"] <= 1 for row in results.values())
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:5]] == ["seed", "0", "1", "mean"]
    assert [line.split(":")[0] for line in lines[5:]] == ["gradual less before", "gradual less after"]
    assert all("standard deviation over seeds" in line for line in lines[5:])
