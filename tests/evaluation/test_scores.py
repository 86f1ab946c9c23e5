import math

import pytest
import torch
from small_models import make_batches, make_bert, make_llama
from transformers import (
    BertForSequenceClassification,
)

from hf_subprune.evaluation.scores import embed, log_losses, neighbour_agreement, perplexity, predicted_classes


def test_embeddings_do_not_depend_on_padding():
    batches = make_batches(1)
    for model in (make_bert(), make_bert(BertForSequenceClassification).eval()):
        together = embed(model, batches)
        assert torch.allclose(together.norm(dim=1), torch.ones(3))
        alone = [
            embed(model, [{"input_ids": ids[None, : int(mask.sum())]}])
            for ids, mask in zip(batches[0]["input_ids"], batches[0]["attention_mask"], strict=True)
        ]
        assert torch.allclose(together, torch.cat(alone), atol=1e-5)


def test_neighbours():
    line = torch.tensor([[0.0, 1.0], [0.1, 1.0], [1.0, 0.0], [1.0, 0.1]])
    line = torch.nn.functional.normalize(line, dim=1)
    assert neighbour_agreement(line, line) == 1
    assert neighbour_agreement(line, line[[0, 2, 1, 3]]) == 0


def test_perplexity_ignores_padding_and_the_first_token():
    model, batches = make_llama(), make_batches()
    losses = []
    for batch in batches:
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            ids = ids[: int(mask.sum())]
            with torch.no_grad():
                log_p = model(ids[None]).logits[0].log_softmax(-1)
            losses += [-float(log_p[i, ids[i + 1]]) for i in range(len(ids) - 1)]
    assert perplexity(model, batches) == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)


def test_log_losses_are_those_of_single_samples():
    model, batches = make_llama(), make_batches()
    losses = log_losses(model, batches)
    assert losses[:, 1].tolist() == [6, 3, 1] * 2
    alone = log_losses(model, [{"input_ids": batches[0]["input_ids"][1:2, :4]}])
    assert torch.allclose(losses[1], alone[0], rtol=1e-5)
    with pytest.raises(ValueError, match="causal language model, which BertModel is not"):
        log_losses(make_bert(), batches)


def test_predicted_classes_are_in_the_order_of_the_samples():
    model, batches = make_bert(BertForSequenceClassification, num_labels=4), make_batches()
    with torch.no_grad():
        expected = torch.cat([model(**batch).logits.argmax(1) for batch in batches])
    assert torch.equal(predicted_classes(model, batches), expected)
    with pytest.raises(ValueError, match="BertModel gives no logits"):
        predicted_classes(make_bert(), batches)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM gives logits of shape \(3, 7, 30\)"):
        predicted_classes(make_llama(), batches)
