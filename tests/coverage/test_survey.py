"""The survey of all architectures: its own check, its isolation and its tables."""

import importlib
import json
import os
import time
from dataclasses import replace

import pytest
import torch
import transformers

from hf_subprune.blocks import Discovery
from hf_subprune.coverage.isolation import isolated
from hf_subprune.coverage.survey import (
    KindOutcome,
    Row,
    examine,
    half,
    judge,
    relative_difference,
    shrunk_difference,
    survey,
)
from hf_subprune.coverage.table import append_row, stored_rows, summary, to_json, to_markdown
from hf_subprune.coverage.tiny import tiny_model
from hf_subprune.discovery.discover import discover
from hf_subprune.discovery.probe_inputs import probe_inputs


@pytest.fixture(scope="module")
def found():
    """A tiny model, inputs for it and its blocks."""
    model = tiny_model("gpt2")
    inputs = probe_inputs(model)
    return model, inputs, discover(model, inputs)


def lost(item, reason):
    return reason


@pytest.mark.slow  # the first process imports everything
def test_a_crash_or_a_hang_costs_one_item_and_the_order_stays():
    assert list(isolated(abs, [-3, 2, -1], lost, seconds=300, workers=2)) == [3, 2, 1]
    assert list(isolated(os._exit, [3], lost, seconds=60, workers=1)) == ["its process ended with exit code 3"]
    start = time.monotonic()
    results = list(isolated(time.sleep, [600, 0], lost, seconds=10, workers=2))
    assert results == ["no result after 10 s", None]
    assert time.monotonic() - start < 60


def test_halves_of_neighbours_differ(found):
    block = found[2].blocks[0]
    first, second = half(block, 0), half(block, 1)
    assert len(first) == block.units // 2
    assert first.tolist() != second.tolist()
    assert (first.diff() > 0).all()
    assert first[0] >= 0 and first[-1] < block.units


def test_halves_hold_as_many_of_each_set():
    block = next(
        block for block in discover(tiny_model("mistral", "base")).blocks if block.queries is not None
    ).queries
    size = block.units // block.sets
    for seed in (0, 1):
        counts = half(block, seed).div(size, rounding_mode="floor").bincount(minlength=block.sets).tolist()
        assert counts == [max(1, min(size // 2 + seed, size))] * block.sets


def test_right_blocks_make_no_difference(found):
    model, inputs, discovery = found
    before = [p.shape for p in model.parameters()]
    assert shrunk_difference(model, discovery.blocks, inputs) < 1e-6
    assert [p.shape for p in model.parameters()] == before


def test_a_wrong_producer_row_is_seen(found):
    model, inputs, discovery = found
    block = next(block for block in discovery.blocks if block.kind == "mlp")
    at = next(i for i, piece in enumerate(block.slices) if not piece.tensor.startswith(block.consumer))
    rolled = replace(block.slices[at], index=block.slices[at].index.roll(1, 0))
    wrong = replace(block, slices=(*block.slices[:at], rolled, *block.slices[at + 1 :]))
    outcome = judge(model, Discovery((wrong,), ()), "mlp", inputs)
    assert outcome.verdict == "wrong"
    assert Row("gpt2", "base", kinds={"mlp": outcome}).silently_wrong


def test_a_shrunk_model_that_fails_is_wrong(found):
    model, inputs, discovery = found
    block = next(block for block in discovery.blocks if block.kind == "attention")
    unfollowed = replace(block, attributes=())
    assert shrunk_difference(model, [unfollowed], inputs) == float("inf")
    assert shrunk_difference(model, [block], inputs) < 1e-6


def test_relative_difference():
    one = torch.tensor([1.0, -4.0])
    assert relative_difference([one], [one + torch.tensor([0.0, 1.0])]) == pytest.approx(0.25)
    assert relative_difference([one], [one, one]) == float("inf")
    assert relative_difference([one], [torch.tensor([1.0, float("nan")])]) == float("inf")
    infinite = torch.tensor([float("-inf"), 2.0])
    assert relative_difference([infinite], [infinite]) == 0.0


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


def test_unknown_type_is_refused():
    with pytest.raises(ValueError, match="no_such_model"):
        survey(["bert", "no_such_model"])


def test_a_type_without_a_main_head_has_no_row_for_it(monkeypatch):
    module = importlib.import_module("hf_subprune.coverage.survey")
    monkeypatch.setattr(module, "isolated", lambda _, items, *rest, **options: [examine(*item) for item in items])
    rows = survey(["git_vision_model"])
    assert [row.head for row in rows] == ["base"]


def test_examines_one_model():
    row = examine("bert", "base")
    assert row.architecture == "BertModel"
    assert {kind: outcome.verdict for kind, outcome in row.kinds.items()} == {
        "mlp": "exact",
        "attention": "exact",
        "channels": "absent",
    }
    assert row.reload == "exact"


def test_a_type_that_cannot_be_built_has_a_reason():
    row = examine("sam_prompt_encoder", "base")
    assert row.problem and not row.kinds and not row.silently_wrong


def test_what_does_not_reload_unpruned_either_is_not_silently_wrong():
    row = examine("youtu", "main")  # its head is saved as if it were tied
    assert row.kinds["attention"].verdict == "exact"
    assert row.reload.startswith("as unpruned: differs by") and not row.silently_wrong


@pytest.mark.slow
def test_nothing_is_silently_wrong_in_a_sample():
    seen = []
    sample = [
        "bert",
        "deberta",
        "llama",
        "gpt2",
        "t5",
        "vit",
        "swin",
        "clip",
        "whisper",
        "mixtral",
        "olmo2",
        "qwen2_vl",
    ]
    rows = survey(sample, progress=seen.append)
    assert seen == rows
    assert [row.head for row in rows if row.model_type == "bert"] == ["base", "main"]
    assert {row.model_type for row in rows} == set(sample)
    for row in rows:
        assert row.kinds, row.problem
        assert not row.silently_wrong
        assert row.reload in ("", "exact")
        for outcome in row.kinds.values():
            assert all(reason.strip() for reason in outcome.refused.values())
            assert bool(outcome.found) == (outcome.verdict in ("exact", "partly"))
            assert bool(outcome.refused) or outcome.verdict != "refused"


def test_an_interrupted_survey_goes_on(monkeypatch, tmp_path):
    file = tmp_path / "rows.jsonl"
    assert stored_rows(file) == []
    for row in ROWS:
        append_row(file, row)
    file.write_text(file.read_text() + '{"transformers": "0.1", "row": {}}\n')
    assert stored_rows(file) == ROWS
    module = importlib.import_module("hf_subprune.coverage.survey")
    asked = []
    monkeypatch.setattr(module, "isolated", lambda _, items, *rest, **options: asked.extend(items) or [])
    done = [Row("bert", "base"), Row("vit", "base")]
    assert survey(["bert", "gpt2", "vit"], ("base",), done=done) == done
    assert asked == [("gpt2", "base")]
