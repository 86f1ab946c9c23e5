import pytest
from small_texts import TEXTS, WORDS, make_bert, make_tokenizer
from tiny import tiny
from tokenizers import processors

from hf_subprune.config import PruneConfig
from hf_subprune.data.packing import Packer
from hf_subprune.data.reading import read

LONG = [" ".join(WORDS[i : i + 20]) for i in range(16)]
SETTINGS = {"samples": 8, "held_out": 4, "max_length": 8}


def with_start():
    tokenizer = make_tokenizer(bos_token="[UNK]")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[UNK] $A", special_tokens=[("[UNK]", 1)]
    )
    return tokenizer


def windows(packer, *texts):
    return [tokenizer_ids(sample) for text in texts for sample in packer.add(text)]


def tokenizer_ids(sample):
    assert sample.features["attention_mask"].all()
    return sample.features["input_ids"].tolist()


def test_texts_follow_one_another_without_padding():
    ids = [make_tokenizer()(text)["input_ids"] for text in TEXTS]
    found = windows(Packer(make_tokenizer(), 10, most=9), *TEXTS)
    joined = [token for one in ids for token in one]
    assert [token for window in found for token in window] == joined[: len(joined) // 10 * 10]


def test_every_window_begins_as_a_text_does():
    found = windows(Packer(with_start(), 8, most=9), *LONG)
    assert all(window[0] == 1 and len(window) == 8 for window in found)
    assert all(1 not in window[1:] for window in found)


def test_a_long_text_does_not_stand_for_all():
    found = windows(Packer(make_tokenizer(), 10, most=2), " ".join(["w1"] * 500_000), "w2 w2 w2 w2 w2 w2 w2 w2 w2 w2")
    assert len(found) == 3 and {4} == {*found[0], *found[1]} and 5 in found[2]


@pytest.mark.parametrize(("packing", "lengths"), [("auto", {8}), (True, {8}), (False, {8})])
def test_long_texts_of_causal_models_are_packed(packing, lengths):
    prepared = read(tiny("llama"), LONG, PruneConfig(**SETTINGS, packing=packing), make_tokenizer())
    assert {batch["input_ids"].shape[1] for batch in prepared.fit} == lengths
    assert prepared.description["padded"] == 0
    assert (prepared.description["cut"] > 0.5) == (packing is False)


def test_short_texts_are_packed_where_they_fill_enough_windows():
    short = [text[:5] for text in LONG]
    alone = read(tiny("llama"), short, PruneConfig(**SETTINGS), make_tokenizer())
    assert {batch["input_ids"].shape[1] for batch in alone.fit} == {3}
    assert sum(len(batch["input_ids"]) for batch in alone.fit) == 8
    packed = read(tiny("llama"), short * 2, PruneConfig(**SETTINGS), make_tokenizer())
    assert {batch["input_ids"].shape[1] for batch in packed.fit} == {8}
    assert sum(len(batch["input_ids"]) for batch in packed.fit) == 8


def test_encoders_are_not_packed():
    encoder = read(make_bert(), LONG, PruneConfig(**SETTINGS), make_tokenizer())
    assert encoder.description["cut"] > 0.5
    with pytest.raises(ValueError, match="packing=True joins plain texts for a causal language model; BertModel"):
        read(make_bert(), LONG, PruneConfig(**SETTINGS, packing=True), make_tokenizer())


def test_samples_to_hold_out_are_windows_of_other_texts():
    prepared = read(tiny("llama"), [f"w{i} " * 40 for i in range(20)], PruneConfig(**SETTINGS), make_tokenizer())
    fitted, held_out = (
        {token for batch in batches for token in batch["input_ids"].flatten().tolist()}
        for batches in (prepared.fit, prepared.held_out)
    )
    assert len(fitted & held_out - {2}) <= 1
