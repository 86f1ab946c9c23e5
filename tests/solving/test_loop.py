import pytest
from batches import ready_batches
from runs_of import QUICK
from tiny import tiny

from hf_subprune import PruneConfig, prune


@pytest.mark.parametrize("variant", ["layer", "seq"])
def test_memory_is_given_back_after_every_block_or_layer(monkeypatch, variant):
    given_back = []
    monkeypatch.setattr("hf_subprune.solving.loop.release_memory", lambda: given_back.append(1))
    model = tiny("llama")
    report = prune(model, ready_batches(model), PruneConfig(**QUICK | {"variant": variant}))
    shrunk = sum(block.units_after < block.units_before for block in report.blocks)
    assert shrunk == 2 * model.config.num_hidden_layers
    # In a layer whose blocks read one another forwards come between, which would take the memory again.
    assert len(given_back) == (shrunk if variant == "layer" else model.config.num_hidden_layers)
