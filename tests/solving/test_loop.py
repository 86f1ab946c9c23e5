"""The one loop that every way of pruning goes through."""

import pytest
import torch
from batches import ready_batches
from runs_of import QUICK, assert_unchanged, snapshot
from same import assert_same_weights
from tiny import tiny

from hf_subprune import PruneConfig, prune, prune_checkpoint
from hf_subprune.allocation.choice import Widths, whole_heads
from hf_subprune.allocation.surveying import take_survey
from hf_subprune.data.reading import read
from hf_subprune.models.linears import weight_matrix
from hf_subprune.models.session import session
from hf_subprune.pruning import prune_sizes
from hf_subprune.runs.workspace import Workspace
from hf_subprune.solving.loop import solve
from hf_subprune.surgery.edits import shrink
from hf_subprune.surgery.masking import mask
from hf_subprune.training.gradual import GradualPruning


def solved(model, install, work, **settings):
    """The model with its units removed by `install`, whatever their widths can be stored as."""
    config = PruneConfig(**QUICK, budget="uniform", **settings)
    with session(model), work.undone_on_failure():
        survey = take_survey(read(model, ready_batches(model), config), [config], None, work)
        kept = whole_heads(survey, config)
        blocks = [block for block in survey.blocks if kept[block.name] < block.units]
        return blocks, solve(survey, Widths(config, blocks, kept), work, install=install)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "mpnet"])
def test_masks_and_surgery_keep_the_same_units_and_write_the_same_weights(family):
    small, masked = tiny(family), tiny(family)
    blocks, removed = solved(small, shrink, Workspace(), variant="layer")
    _, zeroed = solved(masked, mask, Workspace(), variant="layer")
    assert set(removed.reports) == {block.name for block in blocks}
    assert list(removed.reports) == list(zeroed.reports) == list(removed.edits) == list(zeroed.edits)
    for block in blocks:
        one, other = removed.reports[block.name], zeroed.reports[block.name]
        assert one.kept_units == other.kept_units and one.kept_columns == other.kept_columns
        assert (one.fitted_error, one.held_out_error) == (other.fitted_error, other.held_out_error)
        consumers = [model.get_submodule(block.consumer) for model in (small, masked)]
        found, at_full_size = map(weight_matrix, consumers)
        kept = list(one.kept_columns)
        gone = sorted(set(range(len(at_full_size))) - set(kept))
        assert gone and torch.equal(found, at_full_size[kept]) and not at_full_size[gone].any()
        if consumers[0].bias is not None:
            assert torch.equal(consumers[0].bias, consumers[1].bias)


@pytest.mark.parametrize("variant", ["layer", "seq", "residual"])
@pytest.mark.parametrize("install", [shrink, mask])
@pytest.mark.parametrize("family", ["llama", "mpnet"])
def test_an_install_that_fails_midway_takes_everything_back(family, install, variant):
    model = tiny(family)
    before = snapshot(model)
    installed = []

    def fail_midway(*args):
        installed.append(args)
        if len(installed) == 4:
            raise RuntimeError("on purpose")
        return install(*args)

    with pytest.raises(RuntimeError, match="on purpose"):
        solved(model, fail_midway, Workspace(), variant=variant)
    assert len(installed) == 4
    assert_unchanged(model, before)


@pytest.mark.slow
def test_every_way_of_pruning_solves_the_same_blocks(tmp_path, computed):
    """`prune`, `prune_sizes`, `prune_checkpoint`, and gradual pruning in one step, which masks before it removes."""
    config = PruneConfig(**QUICK, variant="layer")
    alone, in_sizes, in_steps = (tiny("gpt2") for _ in range(3))
    alone.save_pretrained(tmp_path / "model")
    batches = ready_batches(alone)
    reports = [prune(alone, batches, config)]
    solutions = [computed.of_blocks(computed.start_anew())]
    for report in prune_sizes(in_sizes, batches, [config]):
        reports.append(report)
        assert_same_weights(in_sizes, alone)
    solutions.append(computed.of_blocks(computed.start_anew()))
    reports.append(prune_checkpoint(tmp_path / "model", batches, config, tmp_path / "out"))
    assert_same_weights(type(alone).from_pretrained(tmp_path / "out"), alone)
    solutions.append(computed.of_blocks(computed.start_anew()))
    reports.append(GradualPruning(in_steps, batches, config).finish())
    assert_same_weights(in_steps, alone)
    solutions.append(computed.of_blocks(computed.start_anew()))
    for report, names in zip(reports, solutions, strict=True):
        assert [block.kept_units for block in report.blocks] == [block.kept_units for block in reports[0].blocks]
        assert names == solutions[0] == [f"blocks/{block.consumer}" for block in report.blocks]
