"""What a survey decides before anything is measured."""

import pytest
from batches import ready_batches
from runs_of import QUICK
from tiny import tiny

from hf_subprune import PruneConfig
from hf_subprune.allocation import surveying
from hf_subprune.collection.sensitivity import tokens_at_once
from hf_subprune.data.reading import read
from hf_subprune.models.session import session
from hf_subprune.runs.workspace import Workspace


@pytest.mark.parametrize("room, again", [(1.0, 0), (0.5, 1), (0.0, 2)])
def test_layers_run_once_more_in_a_backward_as_far_as_their_graph_finds_no_room(monkeypatch, room, again):
    model = tiny("llama")
    config = PruneConfig(**QUICK)
    monkeypatch.setattr(
        surveying, "_sensitivities", lambda survey, store: seen.append(survey) or surveying.Means({}, store)
    )
    seen = []
    with session(model):
        surveying.take_survey(read(model, ready_batches(model), config, None), [config], None, Workspace())
    (survey,) = seen
    assert model.config.num_hidden_layers == 2
    tokens = tokens_at_once(survey.samples)
    read_by = sum(model.get_submodule(block.consumer).weight.shape[1] for block in survey.candidates)
    graph = surveying._KEPT * tokens * read_by * 4
    monkeypatch.setattr(surveying, "_GRAPH_BYTES", room * graph)
    assert surveying._recomputed(survey) == [f"model.layers.{layer}" for layer in range(2)][2 - again :]
