"""Texts of a few words, and what reads them: a tokenizer of these words, and a BERT."""

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

WORDS = [f"w{i}" for i in range(40)]
TEXTS = [" ".join(WORDS[i % 7 : i % 7 + 3 + i % 5]) for i in range(30)]
SMALL = {"samples": 8, "held_out": 4, "batch_size": 3}
TEXT_MODEL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}


def make_tokenizer(pad="[PAD]", side="right", ends=1, **kwargs):
    vocabulary = {token: i for i, token in enumerate(["[PAD]", "[UNK]", "[EOS]", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    single = "$A" + " [EOS]" * ends
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("[EOS]", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=pad, eos_token="[EOS]", unk_token="[UNK]", padding_side=side, **kwargs
    )


def make_bert(cls=BertModel, **kwargs):
    config = {"vocab_size": 43, "max_position_embeddings": 64, **TEXT_MODEL, **kwargs}
    return cls(BertConfig(**config)).eval()


def texts_of(batches, tokenizer):
    return [text for batch in batches for text in tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)]
