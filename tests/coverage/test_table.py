"""The survey in words, as Markdown and as JSON."""

import json

import transformers

from hf_subprune.coverage.survey import KindOutcome, Row
from hf_subprune.coverage.table import append_row, stored_rows, summary, to_json, to_markdown

ROWS = [
    Row(
        "alpha",
        "base",
        "AlphaModel",
        kinds={"mlp": KindOutcome("exact", 2), "attention": KindOutcome("refused", 0, {"layer.0.o": "a norm|spans"})},
        layout="ragged",
        reload="exact",
    ),
    Row(
        "alpha",
        "main",
        "AlphaForCausalLM",
        kinds={"mlp": KindOutcome("partly", 1, {"head": "tied"}), "attention": KindOutcome("absent")},
        layout="ragged",
        reload="differs by 1.0e+00",
    ),
    Row("beta", "base", problem="needs a library"),
]


def test_summary_counts():
    text = summary(ROWS)
    assert transformers.__version__ in text
    base, main = text.split("silently wrong: 0. ")
    assert "bare models: 2 types, 1 built and run" in base and "main head: 1 types, 1 built and run" in main
    assert "of 1 with mlp blocks, 1 shrink exactly and 0 in part" in base
    assert "of 1 with mlp blocks, 0 shrink exactly and 1 in part" in main
    assert "of 1 with attention blocks, 0 shrink exactly and 0 in part" in base
    assert "1 of 1 pruned models reload exactly" in base and "0 of 1 pruned models" in main
    assert main.endswith("silently wrong: 1.")


def test_markdown_has_a_line_per_model_and_every_reason():
    text = to_markdown(ROWS)
    assert "| alpha | AlphaModel | exact (2) | refused | none | ragged | exact |" in text
    assert "attention: a norm|spans (AlphaModel `layer.0.o`" in text
    assert "- beta (base): needs a library" in text


def test_json_keeps_every_field():
    read = json.loads(to_json(ROWS))
    assert read["transformers"] == transformers.__version__
    assert read["rows"][0]["kinds"]["attention"]["refused"] == {"layer.0.o": "a norm|spans"}


def test_rows_that_were_appended_are_read_unless_another_release_wrote_them(tmp_path):
    file = tmp_path / "rows.jsonl"
    assert stored_rows(file) == []
    for row in ROWS:
        append_row(file, row)
    file.write_text(file.read_text() + '{"transformers": "0.1", "row": {}}\n')
    assert stored_rows(file) == ROWS
