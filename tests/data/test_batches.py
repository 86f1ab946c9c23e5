import torch
from small_texts import SMALL, TEXTS

from hf_subprune.config import PruneConfig
from hf_subprune.data.reading import read


def test_rows_leave_padding_out_and_count_held_out_batches_last(bert, tokenizer):
    prepared = read(bert, TEXTS, PruneConfig(**SMALL), tokenizer)
    for index, batch in enumerate(prepared.fit + prepared.held_out):
        x = torch.randn(*batch["input_ids"].shape, 24)
        rows = prepared.rows(x, index, "encoder.layer.0.output.dense")
        assert torch.equal(rows, x[batch["attention_mask"].bool()])
