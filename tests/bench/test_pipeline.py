"""The bench of stages: rows that add up, on a language model of one's own."""

import json

import pytest
from small_texts import TEXT_MODEL, TEXTS, make_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from hf_subprune.bench import pipeline
from hf_subprune.cli import app
from hf_subprune.config import PruneConfig


@pytest.fixture
def language_model(tmp_path):
    """A folder with a model, and a file of text."""
    tokenizer = make_tokenizer()
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **TEXT_MODEL)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("\n".join(TEXTS * 6), encoding="utf-8")
    return str(tmp_path / "model"), str(tmp_path / "text.txt")


@pytest.mark.parametrize("name", ["default", "neurons, layer"])
def test_stages_add_up_to_the_run(language_model, name):
    config = PruneConfig(**{"keep": 0.5, "samples": 6, "held_out": 2, "max_length": 8, **pipeline.RUNS[name]})
    row = json.loads(json.dumps(pipeline._row(name, pipeline.loaded(*language_model), config)))
    assert row["run"] == name and row["forward"] > 0 and row["model"] > 0
    assert row["ratio"] == pytest.approx(row["total"] / row["forward"])
    assert 0 < sum(row["stages"].values()) <= row["total"]
    assert {"discovery", "calibration", "selection", "evaluation"} <= set(row["stages"])
    shown = pipeline.table([row])
    assert [str(column.header) for column in shown.columns] == ["", name]


@pytest.mark.parametrize(
    ("words", "message"),
    [((), "come together"), (("--data", "text.txt", "--run", "quick"), "Unknown run 'quick'")],
)
def test_a_model_comes_with_data_and_runs_have_names(words, message):
    result = CliRunner().invoke(app, ["bench", "pipeline", "--model", "folder", *words], env={"COLUMNS": "160"})
    assert result.exit_code == 2
    assert message in result.output
