import json

import pytest
from served import LlamaCpp, byte_level, causal_lm
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from hf_subprune.serving.export import export
from hf_subprune.serving.gguf_tokens import splitting_name

gguf = pytest.importorskip("gguf")

WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
PLAIN = "def exported(self, model): # it's 12345 tokens"
HARD = [
    "We'LL  see;\n\n\tit's   DON'T\n",
    "a1b22c333d4444 3.14159",
    "naïve Ärger 日本語 ünï 😀!",
    "  x == y  ",
    "\n \n",
]


def split_at(words):
    split = pre_tokenizers.Split(Regex(words), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


SPLITS = {
    "gpt-2": lambda: byte_level(),
    "smollm": lambda: byte_level(
        pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    ),
    "llama-bpe": lambda: byte_level(split_at(CONTRACTIONS + WORDS % r"\p{N}{1,3}"), ignore_merges=True),
    "dbrx": lambda: byte_level(split_at(CONTRACTIONS + WORDS % r"\p{N}{1,3}")),
    "qwen2": lambda: byte_level(split_at(CONTRACTIONS + WORDS % r"\p{N}")),
}


def described(tokenizer):
    return json.loads(tokenizer.backend_tokenizer.to_str())


@pytest.mark.parametrize("name", SPLITS)
def test_llama_cpp_splits_text_as_the_tokenizer_does(name, tmp_path):
    pytest.importorskip("xllamacpp")
    tokenizer = SPLITS[name]()
    assert splitting_name(described(tokenizer)) == name
    causal_lm(num_hidden_layers=1).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    runtime = LlamaCpp(export(tmp_path / "model", "gguf", tmp_path / "model.gguf"))
    for text in (PLAIN, *HARD, f"{PLAIN}</s>"):
        assert runtime.tokens(text) == tokenizer(text)["input_ids"], text


def test_special_tokens_are_added_where_the_tokenizer_adds_them(tmp_path):
    pytest.importorskip("xllamacpp")
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 0)]
    )
    causal_lm(num_hidden_layers=1).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    runtime = LlamaCpp(export(tmp_path / "model", "gguf", tmp_path / "model.gguf"))
    assert runtime.tokens(PLAIN) == tokenizer(PLAIN)["input_ids"] == [0, *tokenizer.encode(PLAIN)[1:]]


def changed(**parts):
    tokenizer = byte_level()
    for name, part in parts.items():
        setattr(tokenizer.backend_tokenizer, name, part)
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (
            lambda: PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))),
            "no byte-level BPE",
        ),
        (
            lambda: changed(normalizer=normalizers.Lowercase()),
            r"changes text \(Lowercase\)",
        ),
        (lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True)), "a blank in front"),
        (lambda: byte_level(split_at(r"\p{L}+|\s")), "name in llama.cpp is unknown"),
    ],
)
def test_what_llama_cpp_would_split_otherwise_is_refused(tokenizer, message):
    with pytest.raises(ValueError, match=f"{message}.*--like ORIGINAL.gguf"):
        splitting_name(described(tokenizer()))


def test_a_model_without_a_tokenizer_is_refused_and_nothing_is_written(tmp_path):
    causal_lm(num_hidden_layers=1).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="tokenizer"):
        export(tmp_path / "model", "gguf", tmp_path / "model.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
