"""What a survey decides before anything is measured."""

import pytest
from batches import ready_batches
from runs_of import QUICK
from tiny import tiny

from hf_subprune import PruneConfig, prune
from hf_subprune.allocation import surveying
from hf_subprune.allocation.foresight import bytes_of_states
from hf_subprune.collection.sensitivity import entries_at_once
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
    tokens = entries_at_once(survey.samples)
    read_by = sum(model.get_submodule(block.consumer).weight.shape[1] for block in survey.candidates)
    graph = surveying._KEPT * tokens * read_by * 4
    monkeypatch.setattr(surveying, "_GRAPH_BYTES", room * graph)
    assert surveying._recomputed(survey) == [f"model.layers.{layer}" for layer in range(2)][2 - again :]


def test_states_of_images_are_counted_by_their_patches():
    model = tiny("vit")
    config = PruneConfig(**QUICK)
    samples = read(model, ready_batches(model), config, None)
    *_, candidates, _ = surveying.find(samples, [config], samples.probe, Workspace())
    images = sum(len(batch["pixel_values"]) for batch in (*samples.fit, *samples.held_out))
    patches = (model.config.image_size // model.config.patch_size) ** 2 + 1
    expected = 2 * 2 * images * patches * model.config.hidden_size * 4  # of two models, twice
    assert bytes_of_states(samples, candidates, config) == pytest.approx(expected, rel=1e-3)


def test_nothing_is_measured_of_blocks_where_all_stay():
    model = tiny("bert")
    report = prune(model, ready_batches(model), PruneConfig(**QUICK, keep=1.0, importance="activation_gradient"))
    assert report.parameters.ratio == 1


def test_one_batch_to_fit_on_leaves_sublayers_in_place():
    model = tiny("llama")
    config = PruneConfig(**QUICK | {"samples": 1, "held_out": 4, "batch_size": 1}, keep=0.5, layout="ragged")
    report = prune(model, ready_batches(model), config)
    assert report.parameters.ratio < 1 and all(block.units_after for block in report.blocks)
