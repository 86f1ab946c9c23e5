import pytest
from batches import ready_batches
from tiny import tiny

from hf_subprune import PruneConfig, prune

QUICK = {"samples": 12, "held_out": 4, "batch_size": 4, "layout": "ragged"}


def widths(report):
    return [block.units_after for block in report.blocks]


def test_labels_decide_equal_loss_when_an_evaluation_is_given():
    model = tiny("bert")
    calls = []

    def evaluation(candidate):
        """Only the last block matters to this user."""
        calls.append(1)
        mlp = candidate.bert.encoder.layer[-1].intermediate.dense.weight
        return -float(56 - mlp.shape[0])

    config = PruneConfig(**QUICK, keep=0.5, budget="equal_loss", units=("mlp",))
    report = prune(model, ready_batches(model), config, evaluation=evaluation)
    assert len(calls) == 1 + 2 * len(report.blocks)
    assert widths(report)[-1] > 2 * max(widths(report)[:-1])
    with pytest.raises(ValueError, match="equal_loss"):
        prune(tiny("bert"), ready_batches(model), PruneConfig(**QUICK), evaluation=evaluation)
