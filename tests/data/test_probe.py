import pytest
import torch
from runs_of import QUICK
from small_texts import make_bert
from tiny import tiny
from transformers import BertForMultipleChoice

from hf_subprune import PruneConfig, prune
from hf_subprune.data.probe import probe_of


def batch_of(*rows, choices=None):
    """Rows of token ids, padded on the right."""
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    found = {"input_ids": ids, "attention_mask": mask}
    return found if choices is None else {name: value.view(-1, choices, longest) for name, value in found.items()}


def counting(length, start=5):
    return list(range(start, start + length))


def test_the_probe_is_the_beginning_and_the_end_of_two_long_samples(bert):
    long = batch_of(counting(34), counting(40, 1), counting(3), counting(38, 2))
    probe = probe_of(bert, [batch_of(counting(2), counting(3)), long])
    assert probe["input_ids"].tolist() == [[*counting(15, 1), 40], [*counting(15, 2), 39]]
    assert probe["attention_mask"].all() and probe["attention_mask"].shape == (2, 16)


def test_the_first_batch_that_is_long_enough_is_taken(bert):
    batches = [batch_of(counting(n), counting(n)) for n in (5, 33, 40)]
    assert probe_of(bert, batches)["input_ids"][0, -1] == 37


def test_padding_on_the_left_is_left_out(bert):
    batch = {name: value.flip(1) for name, value in batch_of(counting(10), counting(12)).items()}
    probe = probe_of(bert, [batch])
    assert probe["input_ids"].tolist() == [counting(10)[::-1], [*counting(12)[::-1][:9], 5]]


@pytest.mark.parametrize("rows", [[[9], [8]], [[9] * 20, [8] * 20], [[9, 8], [7, 6, 5]]])
def test_short_and_uniform_texts_get_further_tokens(bert, rows):
    batch = {**batch_of(*rows), "token_type_ids": torch.ones(2, max(map(len, rows)), dtype=torch.long)}
    probe = probe_of(bert, [batch])
    assert all(len(set(row)) >= 6 for row in probe["input_ids"].tolist())
    assert probe["attention_mask"].all() and probe["token_type_ids"].all()
    assert len({tuple(value.shape) for value in probe.values()}) == 1
    assert probe["input_ids"][:, 0].tolist() == [row[0] for row in rows]


def test_no_more_tokens_are_added_than_a_model_has_positions_for():
    probe = probe_of(make_bert(max_position_embeddings=4), [batch_of([9], [8])])
    assert probe["input_ids"].shape == (2, 4)


def test_decoders_get_several_tokens_too():
    model = tiny("t5")
    batch = {**batch_of(counting(12), counting(12)), "decoder_input_ids": torch.zeros(2, 1, dtype=torch.long)}
    probe = probe_of(model, [batch])
    assert probe["input_ids"].shape == (2, 12) and probe["decoder_input_ids"].shape == (2, 8)


def test_choices_stay_together():
    model = make_bert(BertForMultipleChoice)
    probe = probe_of(model, [batch_of(*[counting(3 + i) for i in range(6)], choices=3)])
    assert probe["input_ids"].shape == probe["attention_mask"].shape == (2, 3, 8)
    model(**probe)


def test_places_of_images_in_a_text_are_kept(bert):
    batch = {**batch_of(counting(40), counting(40)), "pixel_values": torch.zeros(2, 3, 4, 4)}
    assert torch.equal(probe_of(bert, [batch])["input_ids"], batch["input_ids"])


def test_masks_of_pairs_of_tokens_are_kept(bert):
    batch = {"input_ids": torch.tensor([[9, 8], [7, 6]]), "attention_mask": torch.ones(2, 1, 2, 2)}
    assert torch.equal(probe_of(bert, [batch])["input_ids"], batch["input_ids"])


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_the_same_blocks_are_found_on_texts_of_one_token(name):
    def found(rows):
        report = prune(tiny(name), [{"input_ids": torch.tensor(row)} for row in rows], PruneConfig(**QUICK))
        return sorted((block.name, block.kind) for block in report.blocks)
