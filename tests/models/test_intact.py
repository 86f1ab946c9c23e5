"""Models that are as they were, whatever ends a change."""

import pytest
from runs_of import assert_unchanged, snapshot
from tiny import tiny

from hf_subprune.models.intact import intact


@pytest.mark.parametrize("ending", [KeyboardInterrupt, SystemExit, ValueError, MemoryError])
@pytest.mark.parametrize("taking_back_fails", [False, True])
def test_a_model_is_as_it_was_and_an_interrupt_is_raised_as_such(ending, taking_back_fails):
    model = tiny("bert", num_hidden_layers=1)
    before = snapshot(model)

    def change():
        try:
            model.bert.encoder.layer[0].intermediate.dense.out_features = 3
            del model.bert.embeddings
            raise ending
        finally:
            if taking_back_fails:
                raise RuntimeError("not the one that it left")

    expected = RuntimeError if taking_back_fails and issubclass(ending, Exception) else ending
    with pytest.raises(expected):
        intact(model, change)
    assert_unchanged(model, before)
