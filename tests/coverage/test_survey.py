"""The survey of all architectures: its own check, and what is asked."""

from dataclasses import replace

import pytest
import torch

from hf_subprune.blocks import Discovery
from hf_subprune.coverage.survey import (
    Row,
    examine,
    half,
    judge,
    relative_difference,
    shrunk_difference,
    survey,
)
from hf_subprune.coverage.tiny import tiny_model
from hf_subprune.discovery.discover import discover
from hf_subprune.discovery.probe_inputs import probe_inputs


@pytest.fixture(scope="module")
def found():
    """A tiny model, inputs for it and its blocks."""
    model = tiny_model("gpt2")
    inputs = probe_inputs(model)
    return model, inputs, discover(model, inputs)


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


def test_unknown_type_is_refused():
    with pytest.raises(ValueError, match="no_such_model"):
        survey(["bert", "no_such_model"])


def test_a_type_without_a_main_head_has_no_row_for_it():
    def run(function, items, failed, **options):
        return map(function, items)

    rows = survey(["git_vision_model"], run=run)
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


def test_an_interrupted_survey_goes_on():
    asked = []

    def run(function, items, failed, **options):
        asked.extend(items)
        return []

    done = [Row("bert", "base"), Row("vit", "base")]
    assert survey(["bert", "gpt2", "vit"], ("base",), done=done, run=run) == done
    assert asked == [("gpt2", "base")]
