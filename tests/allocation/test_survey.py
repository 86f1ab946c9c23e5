import copy
import re

import torch
from batches import ready_batches
from tiny import tiny

from hf_subprune import PruneConfig, prune
from hf_subprune.allocation import survey
from hf_subprune.allocation.surveying import take_survey
from hf_subprune.data.reading import read
from hf_subprune.models.session import session
from hf_subprune.pruning import prune_sizes
from hf_subprune.runs.workspace import Workspace

QUICK = {"samples": 12, "held_out": 4, "batch_size": 4, "layout": "ragged"}


def widths(report):
    return [block.units_after for block in report.blocks]


def test_several_sizes_come_from_one_calibration(monkeypatch, computed):
    model = tiny("bert")
    batches = ready_batches(model)
    before = {name: (id(p), p.detach().clone()) for name, p in model.named_parameters()}
    config_before = model.config.to_dict()
    configs = [PruneConfig(**QUICK, keep=keep, variant="layer") for keep in (0.75, 0.5)]
    with monkeypatch.context() as patched:
        patched.setattr(survey, "walk", None)  # moments are at hand once the survey is taken
        together = [(r, copy.deepcopy(model.state_dict())) for r in prune_sizes(model, batches, configs)]
    found = [name for name in computed.names if not name.startswith("blocks/")]
    assert sorted(found) == ["absent", "blocks", "curves", "original", "sensitivities"]
    assert {name: id(p) for name, p in model.named_parameters()} == {name: old[0] for name, old in before.items()}
    assert all(torch.equal(p, before[name][1]) for name, p in model.named_parameters())
    assert model.config.to_dict() == config_before
    for config, (report, state) in zip(configs, together, strict=True):
        alone = tiny("bert")
        single = prune(alone, batches, config)
        assert widths(single) == widths(report)
        assert all(torch.equal(value, state[name]) for name, value in alone.state_dict().items())
    first, second = (report for report, _ in together)
    assert first.parameters.after > second.parameters.after


def surveyed(model, config):
    with session(model):
        return take_survey(read(model, ready_batches(model), config), [config], None, Workspace())


def test_a_few_layers_stand_for_all_that_get_one_width():
    model = tiny("llama", num_hidden_layers=10)
    found = surveyed(model, PruneConfig(**{**QUICK, "layout": "auto"}, keep=0.6))
    assert found.families_of(found.configs[0]).even
    for kind in ("mlp", "self_attn"):
        layers = sorted(int(re.search(r"\d+", name).group()) for name in found.curves if name.endswith(kind))
        assert layers == [1, 3, 5, 7, 9]
        assert found.losses[f"model.layers.4.{kind}"] == found.losses[f"model.layers.3.{kind}"]
    assert set(found.losses) == {block.name for block in found.blocks}


def test_every_layer_that_gets_a_width_of_its_own_is_looked_at():
    found = surveyed(tiny("llama", num_hidden_layers=6), PruneConfig(**QUICK, keep=0.6, units=("mlp",)))
    assert set(found.curves) == set(found.losses) == {block.name for block in found.blocks}
    assert len(found.curves) == 6
