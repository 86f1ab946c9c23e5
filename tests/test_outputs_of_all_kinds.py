"""Models whose forward returns something else than a `ModelOutput`, as heads that users write do."""

import pytest
import torch
from runs_of import QUICK
from torch import nn
from transformers import BertConfig, BertModel, BertPreTrainedModel

from hf_subprune import PruneConfig, prune, recover


class TwoTasks(BertPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.bert = BertModel(config)
        self.topic, self.tone = nn.Linear(config.hidden_size, 3), nn.Linear(config.hidden_size, 2)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None):
        first = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state[:, 0]
        return {"topic": self.topic(first), "tone": self.tone(first)}


class InTuples(TwoTasks):
    def forward(self, input_ids=None, attention_mask=None):
        return tuple(super().forward(input_ids, attention_mask).values())


class InTensors(TwoTasks):
    def forward(self, input_ids=None, attention_mask=None):
        return super().forward(input_ids, attention_mask)["topic"]


@pytest.mark.parametrize("cls", [TwoTasks, InTuples, InTensors])
def test_any_kind_of_output_is_pruned_and_recovered(cls):
    def made():
        torch.manual_seed(0)
        return cls(
            BertConfig(vocab_size=43, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24)
        ).eval()

    model, data = made(), [{"input_ids": torch.randint(3, 43, (4, 9))} for _ in range(8)]
    report = prune(model, data, PruneConfig(**QUICK))
    assert report.parameters.ratio < 1 and report.drift["relative_error"] > 0
    recovery = recover(model, made(), data, steps=2, config=PruneConfig(**QUICK))
    assert len(recovery.losses) == 2 and min(recovery.losses) > 0
