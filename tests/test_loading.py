import copy
import importlib
import json

import pytest
import torch
import transformers as tf
from fresh import WIDTHS, ragged, run_fresh
from hand_pruned import FAMILIES, IMAGES, SIZES, TEXT, TOKENS, outputs
from safetensors.torch import load_file, save_file
from same import assert_same_weights
from torch import nn
from transformers.quantizers import HfQuantizer, auto
from transformers.utils.quantization_config import QuantizationConfigMixin

import hf_subprune.loading
from hf_subprune.storage import spec
from hf_subprune.storage.layout import choose_layout


def the_same_in_a_fresh_process(folder, before=""):
    """Load every model below `folder` with AutoModel classes, compare with what is stored beside it; their names."""
    script = f"""
        import json, sys
        from pathlib import Path
        import torch, transformers
        {before}
        from hand_pruned import FAMILIES, outputs
        found = []
        for folder in sorted(Path(sys.argv[1]).iterdir()):
            about = json.loads((folder / "about.json").read_text())
            model = getattr(transformers, about["class"]).from_pretrained(folder, **about["kwargs"])
            inputs = {{
                name: value.to(model.dtype) if value.is_floating_point() else value
                for name, value in FAMILIES[about["family"]].inputs.items()
            }}
            weights, expected = torch.load(folder / "weights.pt"), torch.load(folder / "outputs.pt")
            assert model.state_dict().keys() == weights.keys(), folder
            assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items()), folder
            difference = (outputs(model, inputs) - expected).abs().max().item()
            assert difference < (1e-5 if model.dtype == torch.float32 else 0.02), (folder, difference)
            found.append(folder.name)
        print(json.dumps(found))
        """
    return run_fresh(script, folder)[0]


def store(model, family, folder, kwargs=None, **save):
    inputs = {
        name: value.to(model.dtype) if value.is_floating_point() else value
        for name, value in FAMILIES[family].inputs.items()
    }
    model.save_pretrained(folder, **save)
    torch.save(model.state_dict(), folder / "weights.pt")
    torch.save(outputs(model, inputs), folder / "outputs.pt")
    about = {"class": type(model).__name__, "family": family, "kwargs": kwargs or {}}
    (folder / "about.json").write_text(json.dumps(about))


@pytest.mark.slow
def test_ragged_models_load_exactly_in_a_fresh_process(tmp_path):
    for family in FAMILIES:
        kept = {**WIDTHS, "heads": [3, 3]} if family == "t5" else WIDTHS
        store(ragged(family, **kept), family, tmp_path / family)
    for dtype in (torch.bfloat16, torch.float16):
        store(ragged("bert").to(dtype), "bert", tmp_path / f"bert-{dtype}")
    # In float16, transformers loads part of any T5 in float32 (`_keep_in_fp32_modules`): only bfloat16 compares.
    store(ragged("t5", mlp=[40, 36]).bfloat16(), "t5", tmp_path / "t5-bfloat16")
    store(ragged("gpt2"), "gpt2", tmp_path / "gpt2-sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "gpt2-sharded").glob("*.safetensors"))) > 1
    store(ragged("llama"), "llama", tmp_path / "llama-placed", {"device_map": {"": "cpu"}})
    store(ragged("llama"), "llama", tmp_path / "llama-auto", {"device_map": "auto"})
    store(ragged("llama"), "llama", tmp_path / "llama-eager", {"attn_implementation": "eager"})
    assert len(the_same_in_a_fresh_process(tmp_path, "import hf_subprune")) == len(FAMILIES) + 7


@pytest.mark.slow
def test_without_hf_subprune_stock_models_load_and_ragged_ones_say_what_to_install(tmp_path):
    model = FAMILIES["bert"].pruned(mlp=[40, 40])
    assert choose_layout(model, "auto", inputs=TOKENS).kind == "stock"
    store(model, "bert", tmp_path / "stock" / "bert")
    ragged("bert").save_pretrained(tmp_path / "ragged")
    block = "sys.modules['hf_subprune'] = None"
    assert the_same_in_a_fresh_process(tmp_path / "stock", block) == ["bert"]
    script = f"""
        import json, sys, transformers
        {block}
        from transformers import AutoConfig, AutoModel
        errors = []
        for ignore in (False, True):
            try:
                AutoModel.from_pretrained(sys.argv[1], ignore_mismatched_sizes=ignore)
            except ValueError as error:
                errors.append(str(error))
        print(json.dumps([errors, AutoConfig.from_pretrained(sys.argv[1]).subprune]))
        """
    (errors, entry), log = run_fresh(script, tmp_path / "ragged")
    assert len(errors) == 2
    for error in errors:
        assert "pip install hf_subprune" in error and "trust_remote_code=True" in error
    assert "delete" not in "".join([*errors, log]) and "MISMATCH" not in log
    assert (entry["library"], entry["install"]) == ("hf_subprune", "pip install hf_subprune")
    assert "Never pass ignore_mismatched_sizes=True" in entry["notice"]


@pytest.mark.parametrize("family", ["bert", "gpt2", "clip"])
def test_a_loaded_model_is_an_ordinary_model(family, tmp_path):
    model = ragged(family)
    model.save_pretrained(tmp_path / "first")
    loaded = type(model).from_pretrained(tmp_path / "first")
    assert type(loaded) is type(model)
    for name in ("is_quantized", "hf_quantizer", "quantization_method"):
        assert not getattr(loaded, name, None)
    assert not getattr(loaded.config, "_is_quantized", False)
    assert loaded.half().dtype == torch.float16
    assert loaded.bfloat16().dtype == torch.bfloat16
    loaded = type(model).from_pretrained(tmp_path / "first", config=loaded.config).float().to("cpu")
    assert loaded.config.subprune == model.config.subprune
    loaded.save_pretrained(tmp_path / "second")
    again = type(model).from_pretrained(tmp_path / "second")
    assert_same_weights(again, model)
    torch.testing.assert_close(outputs(again, FAMILIES[family].inputs), outputs(model, FAMILIES[family].inputs))


def test_the_model_inside_and_the_class_around(tmp_path):
    classifier = ragged("bert")
    classifier.save_pretrained(tmp_path / "classifier")
    encoder = tf.AutoModel.from_pretrained(tmp_path / "classifier")
    assert type(encoder) is tf.BertModel
    expected = outputs(classifier.bert, TOKENS)
    assert_same_weights(encoder, classifier.bert)
    torch.testing.assert_close(outputs(encoder, TOKENS), expected)
    encoder.save_pretrained(tmp_path / "encoder")
    again = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "encoder")
    assert_same_weights(again.bert, classifier.bert)
    torch.testing.assert_close(outputs(again.bert, TOKENS), expected)
    other = tf.AutoModelForMaskedLM.from_pretrained(tmp_path / "classifier")
    assert_same_weights(other.bert.encoder, classifier.bert.encoder)
    torch.testing.assert_close(outputs(other.bert, TOKENS)[: 2 * 6 * 32], expected[: 2 * 6 * 32])
    classifier.bert.save_pretrained(tmp_path / "part")
    part = tf.AutoModel.from_pretrained(tmp_path / "part")
    assert_same_weights(part, classifier.bert)
    torch.testing.assert_close(outputs(part, TOKENS), expected)


def test_one_side_of_a_model_with_several(tmp_path):
    clip = ragged("clip")
    clip.save_pretrained(tmp_path / "clip")
    vision = tf.CLIPVisionModel.from_pretrained(tmp_path / "clip")
    assert_same_weights(vision, clip.vision_model)
    torch.testing.assert_close(outputs(vision, IMAGES), outputs(clip.vision_model, IMAGES))
    text = tf.CLIPTextModel.from_pretrained(tmp_path / "clip")
    assert_same_weights(text, clip.text_model)
    torch.testing.assert_close(outputs(text, TOKENS), outputs(clip.text_model, TOKENS))
    seq2seq = ragged("t5", mlp=[40, 36])
    seq2seq.save_pretrained(tmp_path / "t5")
    encoder = tf.T5EncoderModel.from_pretrained(tmp_path / "t5")
    assert_same_weights(encoder.encoder, seq2seq.encoder)
    torch.testing.assert_close(outputs(encoder, TOKENS), outputs(seq2seq.encoder, TOKENS))


def test_experts_whose_weights_are_split_in_the_files(tmp_path):
    sizes = {**SIZES, "num_key_value_heads": 4, "num_local_experts": 4}
    model = tf.MixtralForCausalLM(tf.MixtralConfig(**sizes, **TEXT)).eval()
    for layer, kept in zip(model.model.layers, (40, 32), strict=True):
        experts = layer.mlp.experts
        gate_up = [part[:, :kept] for part in experts.gate_up_proj.detach().chunk(2, dim=1)]
        experts.gate_up_proj = nn.Parameter(torch.cat(gate_up, dim=1))
        experts.down_proj = nn.Parameter(experts.down_proj.detach()[..., :kept].clone())
        experts.intermediate_dim = kept
    assert choose_layout(model, "auto", inputs=TOKENS).kind == "ragged"
    model.save_pretrained(tmp_path)
    assert "model.layers.1.mlp.experts.down_proj" not in load_file(tmp_path / "model.safetensors")
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same_weights(again, model)
    torch.testing.assert_close(outputs(again, TOKENS), outputs(model, TOKENS))


def test_two_models_in_one(tmp_path):
    encoder = FAMILIES["bert"].pruned(**WIDTHS).bert
    config = tf.BertConfig(**SIZES, **TEXT, max_position_embeddings=16, is_decoder=True, add_cross_attention=True)
    model = tf.EncoderDecoderModel(encoder=encoder, decoder=tf.BertLMHeadModel(config)).eval()
    inputs = {**TOKENS, "decoder_input_ids": TOKENS["input_ids"]}
    assert choose_layout(model, "auto", inputs=inputs).kind == "ragged"
    model.save_pretrained(tmp_path)
    again = tf.EncoderDecoderModel.from_pretrained(tmp_path)
    assert_same_weights(again, model)
    torch.testing.assert_close(outputs(again, inputs), outputs(model, inputs))


def test_layers_left_on_disk(tmp_path):
    model = ragged("llama")
    model.save_pretrained(tmp_path / "model")
    places = dict.fromkeys(
        ["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"], "cpu"
    )
    settings = {"device_map": {**places, "model.layers.1": "disk"}, "offload_folder": tmp_path / "disk"}
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "model", **settings)
    torch.testing.assert_close(outputs(loaded, TOKENS), outputs(model, TOKENS))
    layout = choose_layout(loaded, "auto", inputs=TOKENS)
    assert layout.kind == "ragged" and "outputs were not, because the model spans several devices" in layout.reason


def test_a_loaded_model_is_pruned_again_and_saved_again(tmp_path):
    ragged("bert", mlp=[40, 36]).save_pretrained(tmp_path / "first")
    model = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "first")
    mlp = model.bert.encoder.layer[0]
    mlp.intermediate.dense.weight = nn.Parameter(mlp.intermediate.dense.weight.detach()[:30].clone())
    mlp.intermediate.dense.bias = nn.Parameter(mlp.intermediate.dense.bias.detach()[:30].clone())
    mlp.output.dense.weight = nn.Parameter(mlp.output.dense.weight.detach()[:, :30].clone())
    mlp.intermediate.dense.out_features = mlp.output.dense.in_features = 30
    assert choose_layout(model, "auto", inputs=TOKENS).kind == "ragged"
    model.save_pretrained(tmp_path / "second")
    again = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "second")
    assert_same_weights(again, model)
    torch.testing.assert_close(outputs(again, TOKENS), outputs(model, TOKENS))
    assert again.bert.encoder.layer[0].intermediate.dense.weight.shape == (30, 32)


@pytest.mark.parametrize("family", ["gpt2", "llama", "bart", "t5"])
def test_generation_with_and_without_cache(family, tmp_path):
    model = ragged(family, mlp=[40, 36], heads=[3, 3])
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    expected = model.generate(**TOKENS, use_cache=False, **settings)
    for cache in ("dynamic", "static"):
        generated = loaded.generate(**TOKENS, cache_implementation=cache, **settings)
        assert torch.equal(generated, expected)


def test_pipeline(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "good": 5, "film": 6}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tf.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[UNK]").save_pretrained(tmp_path)
    model = ragged("bert")
    model.save_pretrained(tmp_path)
    [answer] = tf.pipeline("text-classification", model=str(tmp_path))("good film")
    logits = model(torch.tensor([[5, 6]])).logits
    assert answer["score"] == pytest.approx(logits.softmax(-1).max().item(), abs=1e-6)


@pytest.mark.slow
def test_trainer_trains_saves_and_resumes(tmp_path):
    ragged("bert").save_pretrained(tmp_path / "model")
    model = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    rows = [{"input_ids": TOKENS["input_ids"][0], "labels": label} for label in (0, 1, 0, 1)]
    settings = tf.TrainingArguments(tmp_path / "run", max_steps=2, save_steps=1, report_to=[], use_cpu=True)
    tf.Trainer(model, settings, train_dataset=rows).train()
    settings.max_steps = 3
    trainer = tf.Trainer(model, settings, train_dataset=rows)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 3
    again = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "checkpoint-3")
    assert_same_weights(again, model)
    torch.testing.assert_close(outputs(again.eval(), TOKENS), outputs(model.eval(), TOKENS))


def test_adapters_train_on_top(tmp_path):
    peft = pytest.importorskip("peft")
    ragged("llama").save_pretrained(tmp_path / "model")
    base = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    adapted = peft.get_peft_model(
        base, peft.LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    )
    adapted.save_pretrained(tmp_path / "adapter")
    base = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert_same_weights(again, adapted)
    torch.testing.assert_close(outputs(again, TOKENS), outputs(adapted.eval(), TOKENS))
    merged = again.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    loaded = type(merged).from_pretrained(tmp_path / "merged")
    assert_same_weights(loaded, merged)
    torch.testing.assert_close(outputs(loaded, TOKENS), outputs(merged, TOKENS))


@pytest.mark.slow
def test_export_and_compile(tmp_path):
    model = ragged("vit")
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    images = FAMILIES["vit"].inputs
    exported = torch.export.export(loaded, (), images).module()
    assert_same_weights(loaded, model)
    torch.testing.assert_close(exported(**images).logits, model(**images).logits)
    compiled = torch.compile(loaded, backend="aot_eager")
    torch.testing.assert_close(compiled(**images).logits, model(**images).logits)


@pytest.mark.parametrize("family", ["bert", "vit"])
def test_weights_of_another_pruning_are_refused_even_when_mismatches_are_to_be_ignored(family, tmp_path):
    """The files of ViT keep names that transformers translates while it loads."""
    ragged(family, mlp=[40, 36]).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = min(name for name, weight in weights.items() if weight.shape == (36, 32))
    weights[name] = weights[name][:30].clone()
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    message = r" has shape \(30, 32\), but .* \(36, 32\): they were not saved together"
    with pytest.raises(ValueError, match=message):
        tf.AutoModel.from_pretrained(tmp_path, ignore_mismatched_sizes=True)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        tf.AutoModel.from_pretrained(tmp_path)


def test_a_new_head_is_allowed(tmp_path):
    model = ragged("bert")
    model.save_pretrained(tmp_path)
    other = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=5, ignore_mismatched_sizes=True)
    assert other.classifier.weight.shape == (5, 32)
    assert_same_weights(other.bert, model.bert)
    torch.testing.assert_close(outputs(other.bert, TOKENS), outputs(model.bert, TOKENS))


def edit_config(folder, change):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))


def test_a_damaged_entry_is_refused(tmp_path):
    ragged("bert").save_pretrained(tmp_path)
    edit_config(tmp_path, lambda config: config["subprune"]["shapes"].popitem())
    with pytest.raises(ValueError, match=r"damaged \(its digest does not match .* restore config.json"):
        tf.AutoModel.from_pretrained(tmp_path, ignore_mismatched_sizes=True)


def test_a_config_of_other_widths_is_refused(tmp_path):
    ragged("bert", mlp=[40, 36]).save_pretrained(tmp_path)
    edit_config(tmp_path, lambda config: config.update(intermediate_size=38))
    with pytest.raises(ValueError, match=r"shape \(40,\), which does not fit inside the shape \(38,\)"):
        tf.AutoModel.from_pretrained(tmp_path)


class Doubling(QuantizationConfigMixin):
    """A quantization that stores each classifier weight doubled, to watch two quantizers at work without a library."""

    def __init__(self, quant_method="doubling"):
        self.quant_method = quant_method


class DoublingQuantizer(HfQuantizer):
    def _process_model_before_weight_loading(self, model, **kwargs):
        self.widths_seen = model.bert.encoder.layer[0].intermediate.dense.out_features

    def _process_model_after_weight_loading(self, model, **kwargs):
        if not self.pre_quantized:
            model.classifier.weight.data.mul_(2)
        return model

    def is_serializable(self):
        return True

    @property
    def is_trainable(self):
        return False


@pytest.fixture
def doubling(monkeypatch):
    monkeypatch.setitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "doubling", Doubling)
    monkeypatch.setitem(auto.AUTO_QUANTIZER_MAPPING, "doubling", DoublingQuantizer)


def test_pruned_then_quantized(tmp_path, doubling):
    model = ragged("bert")
    model.save_pretrained(tmp_path / "pruned")
    quantized = type(model).from_pretrained(tmp_path / "pruned", quantization_config=Doubling())
    assert quantized.hf_quantizer.widths_seen == 40
    assert quantized.is_quantized and quantized.quantization_method == "doubling"
    assert torch.equal(quantized.classifier.weight, 2 * model.classifier.weight)
    quantized.save_pretrained(tmp_path / "both")
    again = type(model).from_pretrained(tmp_path / "both")
    assert again.is_quantized
    assert_same_weights(again, quantized)
    torch.testing.assert_close(outputs(again, TOKENS), outputs(quantized, TOKENS))


def as_first_saved(folder, quantized=None):
    """Turn a saved model into what version 0.2 saved: widths among the ways to quantize, and no code beside."""
    old = {"quant_method": "subprune (pip install hf_subprune)", "library": "hf_subprune"}

    def to_old(config):
        for inner in filter(lambda value: isinstance(value, dict), list(config.values())):
            to_old(inner)
        if "subprune" in config:
            entry = config.pop("subprune")
            content = {"format": 1, **{name: entry[name] for name in ("shapes", "attributes")}}
            config["quantization_config"] = {**old, **content, "digest": spec._digest(content)}
            if quantized is not None:
                config["quantization_config"]["then"] = quantized
        for name in ("auto_map", "transformers_weights"):
            config.pop(name, None)

    edit_config(folder, to_old)
    (folder / "modeling_subprune.py").unlink()


@pytest.mark.parametrize("family", ["bert", "clip", "t5"])
def test_what_version_0_2_saved_loads_and_is_saved_as_now(family, tmp_path):
    model = ragged(family, mlp=[40, 36])
    model.save_pretrained(tmp_path / "old")
    as_first_saved(tmp_path / "old")
    loaded = type(model).from_pretrained(tmp_path / "old")
    assert_same_weights(loaded, model)
    assert not hasattr(loaded.config, "quantization_config")
    loaded.save_pretrained(tmp_path / "new")
    assert "quant_method" not in (tmp_path / "new" / "config.json").read_text()
    again = type(model).from_pretrained(tmp_path / "new")
    torch.testing.assert_close(outputs(again, FAMILIES[family].inputs), outputs(model, FAMILIES[family].inputs))


def test_what_version_0_2_saved_quantized_loads(tmp_path, doubling):
    model = ragged("bert")
    model.save_pretrained(tmp_path)
    as_first_saved(tmp_path, quantized={"quant_method": "doubling"})
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.is_quantized and loaded.quantization_method == "doubling"
    assert_same_weights(loaded, model)


def test_a_reload_of_the_module_leaves_everything_in_place_once(tmp_path):
    importlib.reload(hf_subprune.loading)
    importlib.reload(hf_subprune.loading)
    for held in (tf.PreTrainedModel.post_init, tf.PreTrainedModel.from_pretrained, tf.PreTrainedModel.save_pretrained):
        assert held.replaced.__module__.startswith("transformers.") and not hasattr(held.replaced, "replaced")
    model = ragged("llama")
    model.save_pretrained(tmp_path)
    assert_same_weights(type(model).from_pretrained(tmp_path), model)


def widths(model):
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


@pytest.mark.parametrize("family", ["llama", "bert", "t5", "clip"])
def test_a_config_builds_a_model_in_its_pruned_widths(family):
    model = ragged(family, mlp=[40, 36])
    for build in (type(model), type(model)._from_config):
        built = build(copy.deepcopy(model.config))
        assert widths(built) == widths(model) and built.config.subprune == model.config.subprune
    inside = tf.AutoModel.from_config(copy.deepcopy(model.config))
    around = {name.removeprefix(f"{model.base_model_prefix}."): shape for name, shape in widths(model).items()}
    assert widths(inside).items() <= around.items()


def test_a_class_of_ones_own_around_or_over_a_pruned_model_is_built_in_its_widths():
    model = ragged("llama")
    config = copy.deepcopy(model.config)

    class Extended(tf.LlamaForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            self.extra = nn.Linear(config.hidden_size, 2)
            self.post_init()

    class Around(tf.PreTrainedModel):
        config_class = tf.BertConfig

        def __init__(self, config):
            super().__init__(config)
            self.inner = tf.LlamaForCausalLM(copy.deepcopy(model.config))
            self.post_init()

    assert widths(Extended(config)).items() >= widths(model).items()
    assert widths(Around(tf.BertConfig()).inner) == widths(model)
