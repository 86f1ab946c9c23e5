import pytest
import torch
from datasets import Dataset
from small_texts import SMALL, TEXTS, WORDS, make_bert, make_tokenizer, texts_of
from tokenizers import processors

from hf_subprune.config import PruneConfig
from hf_subprune.data.reading import read
from hf_subprune.data.texts import Written, tokenize

CONFIG = PruneConfig(**SMALL)


def chatty():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
    return tokenizer


def turns(text, user=("role", "content", "user", "assistant")):
    role, content, one, other = user
    return [{role: one, content: text}, {role: other, content: "w9"}]


@pytest.mark.parametrize(
    "row",
    [
        lambda text: {"messages": turns(text), "id": "a"},
        lambda text: {"conversations": turns(text, ("from", "value", "human", "gpt"))},
        lambda text: {"prompt": turns(text)[:1], "completion": turns(text)[1:]},
    ],
)
def test_conversations_are_written_by_the_chat_template(bert, row):
    tokenizer = chatty()
    prepared = read(bert, [row(text) for text in TEXTS], CONFIG, tokenizer)
    found = [ids[mask.bool()] for b in prepared.fit for ids, mask in zip(*b.values(), strict=True)]
    assert set(map(tokenizer.decode, found)) <= {f"[UNK] {text} [UNK] w9" for text in TEXTS}


def test_conversations_need_a_chat_template(bert, tokenizer):
    with pytest.raises(ValueError, match=r"conversations .column 'messages'.*no chat template"):
        read(bert, [{"messages": turns(text)} for text in TEXTS], CONFIG, tokenizer)


def test_a_prompt_and_its_completion_are_one_text(bert, tokenizer):
    rows = [{"prompt": text, "completion": " w9"} for text in TEXTS]
    assert set(texts_of(read(bert, rows, CONFIG, tokenizer).fit, tokenizer)) <= {f"{text} w9" for text in TEXTS}


def test_pairs_of_sentences_are_joined_by_the_tokenizer(bert):
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A [EOS]", pair="$A [EOS] $B:1 [EOS]:1", special_tokens=[("[EOS]", 2)]
    )
    data = Dataset.from_dict({"sentence1": TEXTS, "sentence2": ["w9"] * 30, "label": [0] * 30})
    batch = read(bert, data, CONFIG, tokenizer).fit[0]
    assert ((batch["input_ids"] == 2).sum(1) == 2).all()


@pytest.mark.parametrize(
    ("truncation", "padding"), [(None, None), ({"max_length": 7, "stride": 1}, {"length": 9, "pad_token": "[PAD]"})]
)
def test_tokenizers_stay_as_they_are(bert, truncation, padding):
    tokenizer = make_tokenizer()
    if truncation:
        tokenizer.backend_tokenizer.enable_truncation(**truncation)
        tokenizer.backend_tokenizer.enable_padding(**padding)
    before = tokenizer.backend_tokenizer.to_str()
    read(bert, TEXTS, PruneConfig(**SMALL, max_length=4), tokenizer)
    assert tokenizer.backend_tokenizer.to_str() == before


class Counting:
    """A tokenizer that notes how long what it is given is."""

    def __init__(self):
        self.tokenizer, self.longest = make_tokenizer(), 0

    def __call__(self, text, **options):
        self.longest = max(self.longest, len(text))
        return self.tokenizer(text, **options)


def test_no_more_than_the_beginning_of_a_long_text_is_tokenized():
    tokenizer = Counting()
    ids, cut = tokenize(tokenizer, Written("w1 w2 w3 " * 1_000_000), 16)
    assert len(ids["input_ids"]) == 16 and tokenizer.longest < 1000
    assert cut == pytest.approx(3_000_000, rel=0.01)


def test_texts_of_few_tokens_for_their_length_are_read_on():
    ids, cut = tokenize(make_tokenizer(), Written("w1" + " " * 10_000 + "w2"), 16)
    assert len(ids["input_ids"]) == 3 and cut == 0


def test_what_is_cut_is_in_the_description(bert, tokenizer):
    texts = [" ".join(WORDS[:19])] * 12
    assert read(bert, texts, PruneConfig(**SMALL, max_length=10), tokenizer).description["cut"] == pytest.approx(0.5)
    assert read(bert, texts, CONFIG, tokenizer).description["cut"] == 0


def test_the_tokenizer_of_another_model_is_refused(tokenizer, tmp_path):
    model = make_bert(bos_token_id=10, eos_token_id=11, pad_token_id=12)
    with pytest.raises(ValueError, match=r"not the tokenizer of BertModel: .* special tokens at 10 .*ordinary ones"):
        read(model, TEXTS, CONFIG, tokenizer)
    make_tokenizer().save_pretrained(tmp_path)
    model.name_or_path = str(tmp_path)  # its own tokenizer is known: the config is not asked
    read(model, TEXTS, CONFIG, tokenizer)
    other = make_tokenizer()
    other.backend_tokenizer.model = type(other.backend_tokenizer.model)(
        {word: number for number, word in enumerate([*reversed(WORDS), "[PAD]", "[UNK]", "[EOS]"])}, unk_token="[UNK]"
    )
    with pytest.raises(ValueError, match="numbers its tokens differently"):
        read(model, TEXTS, CONFIG, other)


def test_fewer_samples_than_asked_for_are_told(bert, tokenizer, caplog):
    read(bert, TEXTS, PruneConfig(samples=28, held_out=10), tokenizer)
    assert "holds 30 samples, of 28 to fit on and 10 to hold out" in caplog.text
    assert "24 are fitted on, 6 held out" in caplog.text


def test_a_sample_that_cannot_be_read_is_named_or_passed_over(bert, tokenizer, caplog):
    texts = [*TEXTS[:11], "w1 \ud800 w2"]
    with pytest.raises((ValueError, TypeError), match=r"Sample 11 of the data cannot be read: .*skip_unreadable=True"):
        read(bert, texts, PruneConfig(), tokenizer)
    prepared = read(bert, texts, PruneConfig(skip_unreadable=True), tokenizer)
    assert prepared.fit_samples + prepared.held_out_samples == 11
    assert "Sample 11 of the data cannot be read" in caplog.text


def test_rows_with_a_missing_value_are_passed_over(bert, tokenizer):
    ids = [{"input_ids": [3] * 4, "token_type_ids": None if i == 3 else [0] * 4} for i in range(9)]
    for data in ([None, *TEXTS[:8]], [{"text": None}, *({"text": text} for text in TEXTS[:8])], ids):
        prepared = read(bert, data, PruneConfig(), tokenizer)
        assert prepared.fit_samples + prepared.held_out_samples == 8


def test_mixtures_hold_rows_of_several_kinds(bert):
    rows = [{"text": text, "messages": None} for text in TEXTS[:8]]
    rows += [{"text": None, "messages": turns("w20")} for _ in range(4)]
    prepared = read(bert, rows, CONFIG, chatty())
    found = texts_of(prepared.fit + prepared.held_out, chatty())
    assert len(found) == 12 and sum("w20" in text for text in found) == 4


def test_rows_of_batches_of_one_are_samples(bert, tokenizer):
    data = Dataset.from_dict({"text": TEXTS}).map(lambda row: dict(tokenizer(row["text"], return_tensors="pt")))
    prepared = read(bert, data, CONFIG)
    assert prepared.fit_samples == 8 and prepared.fit[0]["input_ids"].ndim == 2
    with pytest.raises(ValueError, match=r"A row must be one sample.*input_ids \(2, 4\)"):
        read(bert, [{"input_ids": [[3] * 4] * 2}] * 5, CONFIG)


def test_columns_of_several_numbers_a_token_are_truncated_and_padded(bert):
    rows = [{"input_ids": [3] * n, "position_ids": torch.full((n, 2), 7).tolist()} for n in range(3, 15)]
    for batch in read(bert, rows, PruneConfig(**SMALL, max_length=9)).fit:
        assert batch["position_ids"].shape == (*batch["input_ids"].shape, 2)
        assert torch.equal(batch["position_ids"][..., 0] == 7, batch["attention_mask"].bool())
