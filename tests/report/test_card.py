import json
import re

import pytest
from huggingface_hub import ModelCard
from sample_report import make_block, make_report

from hf_subprune.report.card import model_card, write_card

BASE = """---
license: mit
language: [en, fr]
pipeline_tag: sentence-similarity
base_model: somebody/root
---
# Base
"""


@pytest.fixture
def folder(tmp_path):
    """What is saved beside the model, as far as a card looks at it."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text("{}")
    return tmp_path


@pytest.fixture
def base(tmp_path):
    """Folder of an original model with a card."""
    path = tmp_path / "base"
    path.mkdir()
    (path / "README.md").write_text(BASE)
    return str(path)


def test_the_header_names_the_base_model_and_what_was_measured():
    header = model_card(make_report(), "me/small").data.to_dict()
    assert header["base_model"] == "somebody/original"
    assert header["base_model_relation"] == "finetune"
    assert header["library_name"] == "transformers"
    assert header["tags"] == ["subprune", "pruned"]
    (result,) = header["model-index"][0]["results"]
    assert result["task"] == {"type": "text-classification"}
    assert result["dataset"] == {"name": "sst2", "type": "sst2", "split": "test"}
    assert result["metrics"] == [{"type": "accuracy", "value": 0.88}]


def test_license_language_and_task_are_those_of_the_base_card(base):
    header = model_card(make_report(model=base), "me/small").data.to_dict()
    assert header["license"] == "mit" and header["language"] == ["en", "fr"]
    assert header["pipeline_tag"] == "sentence-similarity"
    metrics = [metric["type"] for result in header["model-index"][0]["results"] for metric in result["metrics"]]
    assert metrics == ["accuracy", "cosine", "relative_error"]


def test_a_local_base_model_is_named_by_what_it_derives_from_and_never_by_its_path(base):
    card = model_card(make_report(model=base, command=""), "me/small")
    assert card.data.base_model == "somebody/root"
    assert base not in str(card)


def test_a_local_base_model_without_a_card_is_nobodys(tmp_path):
    header = model_card(make_report(model=str(tmp_path), metrics=()), "me/small").data.to_dict()
    assert not {"base_model", "base_model_relation", "license", "model-index", "model_name"} & set(header)


def test_a_base_card_that_cannot_be_read_is_left_out(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: [\n---\n")
    assert "license" not in model_card(make_report(model=str(tmp_path)), "me/small").data.to_dict()


def test_given_metadata_replaces_what_was_found(base):
    given = {"license": "apache-2.0", "base_model": "a/b", "datasets": ["wiki"]}
    header = model_card(make_report(model=base), "me/small", card_data=given).data.to_dict()
    assert {name: header[name] for name in given} == given
    assert header["base_model_relation"] == "finetune" and header["language"] == ["en", "fr"]


def test_the_body_says_what_changed_how_and_within_which_limits():
    body = model_card(make_report(), "me/small").text
    assert "25% of its parameters removed" in body
    assert re.search(r"\| parameters \| 2 M \| 1.5 M \| 0.750 \|", body)
    assert "batch 4, length 16, cpu, 2 threads" in body
    assert "at least 90.0% of what the best choice" in body
    assert "MLP neurons and attention heads are gone" in body
    assert all(block.name in body for block in make_report().blocks)
    assert "Its output is the model's." in body
    assert "hf-subprune prune somebody/original --keep 0.75" in body
    assert "hf_subprune 0.1.0, torch 2.6; 3 s of wall time, at most 0.5 GB" in body
    assert "Calibrated on 6 samples (90 tokens) of: list of str." in body
    assert "No labelled task" not in body
    assert "2203.04940" in body
    assert "None" not in body and "{{" not in body


def test_figures_that_are_missing_leave_no_holes():
    blocks = (make_block(guarantee=None),)
    report = make_report(blocks=blocks, metrics=(), refusals=(), command="", data={"source": "x", "fit_samples": 3})
    body = model_card(report, "me/small").text
    assert "best choice" not in body and "left whole" not in body and "None" not in body
    assert "whole MLP neurons are gone" in body
    assert "PruneConfig(keep=0.75)" in body
    assert "Calibrated on 3 samples of: x." in body
    assert "No labelled task was evaluated" in body


def code_blocks(body):
    return re.findall(r"```python\n(.*?)```", body, flags=re.DOTALL)


def test_a_stock_model_is_loaded_by_transformers_alone(folder):
    (load,) = code_blocks(model_card(make_report(), "me/small", folder=folder).text)
    assert load.splitlines() == [
        "from transformers import AutoTokenizer, BertModel",
        "",
        'model = BertModel.from_pretrained("me/small")',
        'tokenizer = AutoTokenizer.from_pretrained("me/small")',
    ]


def test_a_ragged_model_is_loaded_by_the_plugin_or_by_remote_code(folder):
    report = make_report(layout="ragged")
    assert len(code_blocks(model_card(report, "me/small", folder=folder).text)) == 1
    (folder / "config.json").write_text(
        json.dumps({"auto_map": {"AutoModelForCausalLM": "m.BertLMHeadModel", "AutoModel": "m.BertModel"}})
    )
    plugin, remote = code_blocks(model_card(report, "me/small", folder=folder).text)
    assert plugin.startswith("import hf_subprune")
    assert 'AutoModel.from_pretrained("me/small", trust_remote_code=True)' in remote


@pytest.mark.parametrize("name", ["preprocessor_config.json", "processor_config.json"])
def test_images_and_mixed_inputs_get_a_processor(folder, name):
    (folder / name).write_text("{}")
    assert (
        'processor = AutoProcessor.from_pretrained("me/small")'
        in model_card(make_report(), "me/small", folder=folder).text
    )


def test_a_written_card_reads_back_and_shows_the_plots_of_its_folder(folder):
    pytest.importorskip("matplotlib")
    make_report().save(folder)
    path = write_card(folder, make_report(), "me/small")
    card = ModelCard.load(path)
    assert card.data.eval_results[0].metric_value == 0.88 and card.data.model_name == "small"
    links = re.findall(r"!\[.+?\]\((.+?)\)", card.text)
    assert len(links) == 4 and all((folder / link).is_file() for link in links)
