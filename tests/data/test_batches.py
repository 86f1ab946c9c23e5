import pytest
import torch
from batches import ready_batches
from runs_of import QUICK, assert_unchanged, snapshot
from small_texts import SMALL, TEXTS
from tiny import tiny

from hf_subprune import PruneConfig, prune, prune_checkpoint
from hf_subprune.allocation.surveying import take_survey
from hf_subprune.collection.stream import Stream
from hf_subprune.data.reading import read
from hf_subprune.models.session import session
from hf_subprune.pruning import prune_to
from hf_subprune.runs.workspace import Workspace

OUT_OF_MEMORY = RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def test_rows_leave_padding_out_and_count_held_out_batches_last(bert, tokenizer):
    prepared = read(bert, TEXTS, PruneConfig(**SMALL), tokenizer)
    for index, batch in enumerate(prepared.fit + prepared.held_out):
        x = torch.randn(*batch["input_ids"].shape, 24)
        rows = prepared.rows(x, index, "encoder.layer.0.output.dense")
        assert torch.equal(rows, x[batch["attention_mask"].bool()])


@pytest.fixture
def room_for(monkeypatch):
    """A device whose memory takes a number of samples."""
    run = Stream.run

    def limit(samples):
        def limited(stream, index, **options):
            if len(stream.batches[index]["input_ids"]) > samples:
                raise OUT_OF_MEMORY
            run(stream, index, **options)

        monkeypatch.setattr(Stream, "run", limited)

    return limit


@pytest.mark.parametrize("variant", ["layer", "seq"])
def test_batches_are_halved_until_they_fit(room_for, variant):
    config = PruneConfig(**QUICK, variant=variant)
    model, other = tiny("llama"), tiny("llama")
    batches = ready_batches(model)
    work = Workspace()
    with session(other):
        survey = take_survey(read(other, batches, config).in_batches_of(1), [config], None, work)
        expected = prune_to(survey, config, work)
    room_for(1)
    report = prune(model, batches, config)
    assert [b.kept_units for b in report.blocks] == [b.kept_units for b in expected.blocks]
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_no_room_for_one_sample_changes_nothing(room_for):
    model = tiny("llama")
    before = snapshot(model)
    batches = ready_batches(model)
    room_for(0)
    with pytest.raises(RuntimeError, match="No executable batch size"):
        prune(model, batches, PruneConfig(**QUICK))
    assert_unchanged(model, before)


def test_checkpoints_are_pruned_in_batches_that_fit(tmp_path, room_for):
    model = tiny("llama")
    batches = ready_batches(model)
    model.save_pretrained(tmp_path / "model")
    room_for(2)
    report = prune_checkpoint(tmp_path / "model", batches, PruneConfig(**QUICK), tmp_path / "out")
    prune(model, batches, PruneConfig(**QUICK))
    found = type(model).from_pretrained(tmp_path / "out")
    assert found.num_parameters() == model.num_parameters() == report.parameters.after


def test_pieces_of_a_batch_stay_in_its_fold():
    model = tiny("bert")
    whole = read(model, ready_batches(model), PruneConfig(**QUICK))
    cut = whole.in_batches_of(3)
    assert max(len(batch["input_ids"]) for batch in (*cut.fit, *cut.held_out)) == 3
    sizes = [len(batch["input_ids"]) for batch in whole.fit]
    assert (cut.fit_samples, cut.held_out_samples) == (sum(sizes), whole.held_out_samples)
    for fold in range(2):
        first, second = (
            torch.cat([b["input_ids"] for b in of.fit[fold : 4 + 4 * (of is cut) : 2]]) for of in (whole, cut)
        )
        assert torch.equal(first, second)


def test_the_probe_is_the_beginning_of_two_samples():
    model = tiny("llama")
    ids = torch.randint(5, 100, (4, 50), generator=torch.Generator().manual_seed(0))
    whole = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for _ in range(6)]
    probe = read(model, whole, PruneConfig(**QUICK)).probe
    assert torch.equal(probe["input_ids"], ids[:2, :32])
    padded = [{"input_ids": ids, "attention_mask": torch.arange(50).expand(4, -1).gt(40).long()} for _ in range(6)]
    assert read(model, padded, PruneConfig(**QUICK)).probe["input_ids"].shape == (2, 50)
