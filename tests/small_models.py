"""Models of a few thousand parameters, and batches of three samples with padding for them."""

import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def make_bert(cls=BertModel, **kwargs):
    torch.manual_seed(0)
    return cls(BertConfig(vocab_size=30, **SIZES, **kwargs)).eval()


def make_llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=30, num_key_value_heads=1, **SIZES)).eval()


def make_batches(count=2, length=7):
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(count):
        mask = torch.ones(3, length, dtype=torch.long)
        mask[1, 4:] = 0
        mask[2, 2:] = 0
        batches.append({"input_ids": torch.randint(3, 30, (3, length), generator=generator), "attention_mask": mask})
    return batches
