import pandas as pd
import pytest
import torch
from datasets import Dataset, DatasetDict, Features, IterableDataset, Value
from small_texts import SMALL, TEXT_MODEL, TEXTS, WORDS, make_bert, make_tokenizer, texts_of
from transformers import GPT2Config, GPT2LMHeadModel, RobertaConfig, RobertaModel

from hf_subprune.config import PruneConfig
from hf_subprune.data import reading as calibration
from hf_subprune.data.reading import batch_all, batch_some, read
from hf_subprune.evaluation.comparison import compare


def test_samples_are_drawn_by_the_seed_and_none_twice(bert, tokenizer):
    texts = [f"{a} {b}" for a in WORDS[:8] for b in WORDS[:8]]

    def drawn(seed):
        prepared = read(bert, texts, PruneConfig(**SMALL, seed=seed), tokenizer)
        return texts_of(prepared.fit + prepared.held_out, tokenizer)

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)
    assert len(set(drawn(1))) == 12


def test_data_frames_are_read_by_their_rows(bert, tokenizer):
    frame = pd.DataFrame({"text": [None, *TEXTS], "label": range(31)}, index=[0] * 31)
    prepared = read(bert, frame, PruneConfig(**SMALL), tokenizer)
    assert (prepared.fit_samples, prepared.source) == (8, "DataFrame")
    assert set(texts_of(prepared.fit + prepared.held_out, tokenizer)) <= set(TEXTS)


def test_a_null_in_the_first_row_does_not_hide_the_column(bert, tokenizer):
    features = Features({"body": Value("string"), "id": Value("int64")})
    data = Dataset.from_dict({"body": [None, *TEXTS], "id": list(range(31))}, features=features)
    prepared = read(bert, data.to_iterable_dataset(), PruneConfig(**SMALL), tokenizer)
    assert prepared.fit_samples == 8


def test_blank_texts_are_passed_over(bert, tokenizer):
    prepared = read(bert, ["", " \n", *TEXTS[:5], ""], PruneConfig(**SMALL), tokenizer)
    assert (prepared.fit_samples, prepared.held_out_samples) == (4, 1)


def test_a_tokenizer_without_a_pad_token_is_left_without():
    bare = make_tokenizer(pad=None)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=43, n_positions=32, n_embd=16, n_layer=1, n_head=2)).eval()
    prepared = read(model, TEXTS, PruneConfig(**SMALL), bare)
    batch = prepared.fit[-1]
    assert (batch["input_ids"][batch["attention_mask"] == 0] == bare.eos_token_id).all()
    assert bare.pad_token is None


def test_lengths_obey_config_tokenizer_and_positions(tokenizer):
    text = [" ".join(WORDS)] * 5

    def length(model, tokenizer, **kwargs):
        return read(model, text, PruneConfig(**kwargs), tokenizer).fit[0]["input_ids"].shape[1]

    assert length(make_bert(), tokenizer) == 41
    assert length(make_bert(), tokenizer, max_length=10) == 10
    assert length(make_bert(), make_tokenizer(ends=2), max_length=1) == 1
    assert length(make_bert(), make_tokenizer(model_max_length=12)) == 12
    assert length(make_bert(max_position_embeddings=14), tokenizer) == 14
    roberta = RobertaModel(
        RobertaConfig(vocab_size=43, max_position_embeddings=18, pad_token_id=1, **TEXT_MODEL)
    ).eval()
    assert length(roberta, tokenizer) == 16
    roberta(**read(roberta, text, PruneConfig(), tokenizer).fit[0])


def flaky_stream(failures, after=3):
    """A dataset of 30 texts whose source breaks after each `after` items, so many times."""
    left = [failures]

    def rows():
        for i, text in enumerate(TEXTS):
            if left[0] and i % after == after - 1:
                left[0] -= 1
                raise ConnectionError("the line is down")
            yield {"text": text}

    return IterableDataset.from_generator(rows)


def test_a_flaky_source_is_tried_again(bert, tokenizer, monkeypatch):
    waits = []
    monkeypatch.setattr(calibration.time, "sleep", waits.append)
    steady = read(bert, flaky_stream(0), PruneConfig(**SMALL), tokenizer)
    prepared = read(bert, flaky_stream(2), PruneConfig(**SMALL), tokenizer)
    assert waits == [1.0, 2.0]
    for a, b in zip(steady.fit + steady.held_out, prepared.fit + prepared.held_out, strict=True):
        assert torch.equal(a["input_ids"], b["input_ids"])


def test_a_dead_source_is_given_up(bert, tokenizer, monkeypatch):
    monkeypatch.setattr(calibration.time, "sleep", lambda seconds: None)
    with pytest.raises(ConnectionError, match="the line is down"):
        read(bert, flaky_stream(100), PruneConfig(**SMALL), tokenizer)


def test_streams_stop_after_the_samples(bert, tokenizer):
    given = []

    def rows():
        for i in range(10_000):
            given.append(i)
            yield {"text": TEXTS[i % 30]}

    read(bert, IterableDataset.from_generator(rows), PruneConfig(**SMALL), tokenizer)
    assert len(given) <= 3 * 12


def test_batch_all_keeps_the_order(bert, tokenizer):
    batches = list(batch_all(bert, TEXTS, tokenizer, batch_size=4))
    assert [len(b["input_ids"]) for b in batches] == [4] * 7 + [2]
    assert texts_of(batches, tokenizer) == TEXTS


def test_batch_all_refuses_a_blank_text(bert, tokenizer):
    with pytest.raises(ValueError, match="blank"):
        list(batch_all(bert, ["w1", " "], tokenizer))


@pytest.mark.parametrize(("samples", "rows"), [(30, 30), (50, 30), (7, 7), (1, 1)])
def test_all_samples_that_are_asked_for_are_compared(bert, tokenizer, samples, rows):
    config = PruneConfig(samples=samples, batch_size=4)
    assert len(texts_of(batch_some(bert, TEXTS, config, tokenizer), tokenizer)) == rows
    ready = [{"input_ids": torch.full((6, 4), 3)} for _ in range(5)]
    assert sum(len(batch["input_ids"]) for batch in batch_some(bert, ready, config)) == rows
    ready = {"input_ids": torch.full((samples, 4), 3)}
    assert compare(bert, bert, ready, PruneConfig(samples=samples), tokenizer).drift.rows == 4 * samples


def test_blank_texts_cannot_be_compared_on(bert, tokenizer):
    with pytest.raises(ValueError, match=r"The data \(list of str\) holds no sample that is not blank"):
        batch_some(bert, ["", " "], PruneConfig(), tokenizer)


@pytest.mark.parametrize(
    ("data", "error", "said"),
    [
        ([], ValueError, r"The calibration data \(list\) is empty"),
        (Dataset.from_dict({"text": []}), ValueError, "is empty"),
        (TEXTS[:2], ValueError, r"at least 3 samples.*shrinkage='auto': 2 to fit on and 1 held out\. Found 2"),
        (["", "  ", *TEXTS[:2]], ValueError, "Found 2"),
        ([" ", ""], ValueError, "Found 0"),
        ("some text", TypeError, "Calibration data must be.*got str"),
        (7, TypeError, "got int"),
        (None, TypeError, "got NoneType"),
        ({"text": TEXTS}, TypeError, r"no tensors: .*Dataset\.from_dict\(data\).*found: 'text'"),
        ({"input_ids": [[3, 4]] * 8}, TypeError, "return_tensors='pt'.*found: 'input_ids'"),
        (pd.DataFrame({"n": [1, 2, 3]}), ValueError, "no text column.*Columns found: 'n'"),
        ([1, 2, 3], TypeError, "item of type int"),
        ([TEXTS, TEXTS], TypeError, "item of type list"),
        ([TEXTS[0], 3, 4, 5], TypeError, "item of type int"),
        (DatasetDict(train=Dataset.from_dict({"text": TEXTS})), TypeError, "one split, choose one of 'train'"),
        (Dataset.from_dict({"a": TEXTS, "b": TEXTS}), ValueError, "no text column.*'a' of type str, 'b' of"),
        (Dataset.from_dict({"n": [1, 2, 3]}), ValueError, r"no text column.*Columns found: 'n'"),
        ([{"text": [*TEXTS]}] * 3, ValueError, "no text column.*Columns found: 'text' of type list"),
        (Dataset.from_dict({"label": TEXTS}), ValueError, "no text column"),
        ([{"input_ids": torch.full((4, 4), 99)}], ValueError, r"token id 99, but BertModel embeds 43 tokens"),
        ([{"input_ids": torch.full((4, 4), -100)}], ValueError, "input_ids .* holds -100, but token ids are 0"),
        ([{"input_ids": torch.ones(4, 0, dtype=torch.long)}], ValueError, r"input_ids .* no token, in shape \(2, 0\)"),
        ([{"input_ids": torch.ones(4, 4)}], ValueError, "input_ids .* whole numbers.*found torch.float32"),
        ([[3, 4, 5]] * 4, TypeError, "item of type list.*{'input_ids': ids}"),
        (torch.full((4, 4), 3), TypeError, "item of type Tensor.*{'input_ids': ids}"),
        ([torch.full((4, 4), 3)] * 4, ValueError, "{'input_ids': ids}.*items are of type Tensor"),
        ([{"input_ids": torch.full((1, 4), 3)}, "text"], TypeError, "Ready batches must all be dicts of tensors"),
    ],
)
def test_bad_data_is_refused_with_what_was_found(bert, tokenizer, data, error, said):
    with pytest.raises(error, match=said):
        read(bert, data, PruneConfig(), tokenizer)
