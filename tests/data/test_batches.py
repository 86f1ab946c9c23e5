import pytest
import torch
from batches import ready_batches
from runs_of import QUICK, assert_unchanged, snapshot
from same import assert_same_weights
from small_texts import SMALL, TEXTS
from tiny import tiny

from hf_subprune import PruneConfig, prune, prune_checkpoint
from hf_subprune.coverage.tiny import tiny_model
from hf_subprune.data.batches import FittingBatches, brief
from hf_subprune.data.reading import read
from hf_subprune.pruning import prune_sizes


def test_rows_leave_padding_out_and_count_held_out_batches_last(bert, tokenizer):
    prepared = read(bert, TEXTS, PruneConfig(**SMALL), tokenizer)
    for index, batch in enumerate(prepared.fit + prepared.held_out):
        x = torch.randn(*batch["input_ids"].shape, 24)
        rows = prepared.rows(x, index, "encoder.layer.0.output.dense")
        assert torch.equal(rows, x[batch["attention_mask"].bool()])


def test_pieces_of_a_batch_stay_in_its_fold():
    model = tiny("bert")
    whole = read(model, ready_batches(model), PruneConfig(samples=20, held_out=4, batch_size=4))
    cut = whole.in_batches_of(3)
    assert max(len(batch["input_ids"]) for batch in (*cut.fit, *cut.held_out)) == 3
    sizes = [len(batch["input_ids"]) for batch in whole.fit]
    assert (cut.fit_samples, cut.held_out_samples) == (sum(sizes), whole.held_out_samples)
    for fold in range(2):
        first, second = (
            torch.cat([b["input_ids"] for b in of.fit[fold : 4 + 4 * (of is cut) : 2]]) for of in (whole, cut)
        )
        assert torch.equal(first, second)


def kept(report):
    return [block.kept_units for block in report.blocks]


def pruned_one_by_one(model, batches, **settings):
    """The report of a run whose data come in batches of one sample from the first."""
    config = PruneConfig(**settings)
    cut = read(model, batches, config).in_batches_of(1)
    return prune(model, [*cut.fit, *cut.held_out], PruneConfig(**settings | {"batch_size": 1}))


@pytest.mark.parametrize("variant", ["layer", "seq"])
def test_batches_are_halved_until_they_fit(room_for, variant):
    model, other = tiny("llama"), tiny("llama")
    batches = ready_batches(model)
    expected = pruned_one_by_one(other, batches, **QUICK, variant=variant)
    room_for(1)
    report = prune(model, batches, PruneConfig(**QUICK, variant=variant))
    assert kept(report) == kept(expected)
    assert_same_weights(model, other)


def test_batches_are_halved_where_whole_experts_go(room_for):
    model, other = tiny_model("qwen2_moe", "main"), tiny_model("qwen2_moe", "main")
    batches = ready_batches(tiny("llama"))
    settings = {**QUICK, "units": ("experts", "mlp"), "keep": {"experts": 0.75, "mlp": 0.5}, "layout": "ragged"}
    expected = pruned_one_by_one(other, batches, **settings)
    room_for(1)
    report = prune(model, batches, PruneConfig(**settings))
    assert {block.kind for block in report.blocks} == {"experts", "mlp"}
    assert kept(report) == kept(expected)
    assert_same_weights(model, other)


@pytest.mark.parametrize("variant", ["layer", "seq"])
def test_batches_are_halved_before_the_first_of_several_sizes(room_for, variant):
    model, keeps = tiny("bert", num_hidden_layers=1), (0.75, 0.5)
    batches, before = ready_batches(model), snapshot(model)
    expected = []
    for keep in keeps:
        other = tiny("bert", num_hidden_layers=1)
        expected.append((pruned_one_by_one(other, batches, **QUICK, variant=variant, keep=keep), other))
    room_for(1)
    configs = [PruneConfig(**QUICK, variant=variant, keep=keep) for keep in keeps]
    for report, (alone, other) in zip(prune_sizes(model, batches, configs), expected, strict=True):
        assert kept(report) == kept(alone)
        assert_same_weights(model, other)
    assert_unchanged(model, before)


def test_batches_are_halved_between_sizes_and_stay_so(room_for):
    model, others = tiny("llama", num_hidden_layers=1), [tiny("llama", num_hidden_layers=1) for _ in range(3)]
    batches, before = ready_batches(model), snapshot(model)
    settings = {**QUICK, "variant": "seq", "budget": "uniform"}
    expected = [prune(others[0], batches, PruneConfig(**settings, keep=0.8))]
    expected += [
        pruned_one_by_one(other, batches, **settings, keep=keep)
        for other, keep in zip(others[1:], (0.6, 0.4), strict=True)
    ]
    configs = [PruneConfig(**settings, keep=keep) for keep in (0.8, 0.6, 0.4)]
    for report, alone, other in zip(prune_sizes(model, batches, configs), expected, others, strict=True):
        assert kept(report) == kept(alone)
        assert_same_weights(model, other)
        room_for(1)
    assert_unchanged(model, before)


def test_no_room_for_one_sample_changes_nothing(room_for):
    model = tiny("llama")
    before = snapshot(model)
    batches = ready_batches(model)
    room_for(0)
    with pytest.raises(RuntimeError, match="No executable batch size"):
        prune(model, batches, PruneConfig(**QUICK))
    assert_unchanged(model, before)


def test_one_of_several_processes_does_not_start_anew_alone(room_for, monkeypatch):
    model = tiny("llama")
    batches = read(model, ready_batches(model), PruneConfig(**QUICK))
    monkeypatch.setattr("hf_subprune.data.batches.processes", lambda: 2)

    def attempt(samples):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(RuntimeError, match=r"One of 2 processes ran out of memory.*smaller `batch_size`"):
        FittingBatches(batches).run(attempt)


def test_checkpoints_are_pruned_in_batches_that_fit(tmp_path, room_for):
    model = tiny("llama")
    batches = ready_batches(model)
    model.save_pretrained(tmp_path / "model")
    room_for(2)
    report = prune_checkpoint(tmp_path / "model", batches, PruneConfig(**QUICK), tmp_path / "out")
    prune(model, batches, PruneConfig(**QUICK))
    found = type(model).from_pretrained(tmp_path / "out")
    assert found.num_parameters() == model.num_parameters() == report.parameters.after


@pytest.mark.parametrize(
    ("samples", "length", "expected"), [(8, 16, (4, 16)), (8, 64, (1, 64)), (3, 200, (1, 64)), (2, 5, (2, 5))]
)
def test_a_brief_batch_has_about_as_many_tokens_as_asked_for(samples, length, expected):
    ids = torch.arange(samples * length).view(samples, length)
    few = brief({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, 64)
    assert few["input_ids"].shape == few["attention_mask"].shape == expected
    assert torch.equal(few["input_ids"], ids[: expected[0], : expected[1]])


def test_a_brief_batch_leaves_out_padding_on_the_left_and_cuts_what_can_be_cut_only():
    ids, mask = torch.arange(20).view(2, 10), torch.ones(2, 10, dtype=torch.long)
    mask[:, :4] = 0
    assert brief({"input_ids": ids, "attention_mask": mask}, 5)["input_ids"].tolist() == [[5, 6, 7, 8, 9]]
    square = torch.zeros(2, 1, 10, 10)
    assert brief({"input_ids": ids, "attention_mask": square}, 5)["input_ids"].shape == (1, 10)
    assert brief({"pixel_values": torch.zeros(4, 3, 8, 8)}, 64)["pixel_values"].shape == (1, 3, 8, 8)
