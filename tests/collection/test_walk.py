import re
from dataclasses import replace

import pytest
import torch
from batches import ready_batches, rows
from tiny import tiny
from torch.nn import functional

from hf_subprune.blocks import groups_of
from hf_subprune.collection import additions
from hf_subprune.collection.additions import find_additions
from hf_subprune.collection.planning import plan
from hf_subprune.collection.walk import walk
from hf_subprune.config import PruneConfig
from hf_subprune.data.batches import Samples
from hf_subprune.data.reading import read
from hf_subprune.discovery.discover import discover
from hf_subprune.models.linears import weight_matrix
from hf_subprune.surgery.edits import shrink

CONFIG = PruneConfig(samples=12, held_out=4, batch_size=4)


def prepared(family, **overrides):
    model = tiny(family, **overrides)
    calibration = read(model, ready_batches(model), CONFIG)
    blocks = discover(model, calibration.probe).blocks
    return model, calibration, blocks, plan(calibration, blocks)


def shares(model, calibration, addition):
    """How much each row counts, one on average: relative to its token's energy if all of the sum goes through a norm,
    else where the token holds over ten times the energy of others.
    """

    def energy_in(some):
        total = rows(model, replace(calibration, fit=some), addition.path, output=not addition.is_input)
        return total.square().sum(1)

    if addition.only_normed:
        weights = 1 / energy_in(calibration.fit)
    else:
        samples = [
            {name: value[index : index + 1] for name, value in batch.items()}
            for batch in calibration.fit
            for index in range(len(next(iter(batch.values()))))
        ]
        of_samples = [energy_in([sample]) for sample in samples]
        weights = torch.cat([(10 * energy.median() / energy).clamp(max=1) for energy in of_samples])
    return weights / weights.mean()


def check(moments, model, calibration, block, addition, target=None):
    """The sums of each fold are those of its rows, those of tokens with massive activations relative to their energy.

    `target` gives the target outputs of some samples; those of the consumer on its inputs where it is left out.
    """
    consumer = model.get_submodule(block.consumer)
    W = weight_matrix(consumer).double()
    for number, fold in enumerate(moments.folds):
        samples = replace(calibration, fit=calibration.fit[number :: len(moments.folds)])
        B, shared = rows(model, samples, block.consumer), shares(model, samples, addition)
        Y = B @ W if target is None else target(samples)
        if consumer.bias is not None:
            B, Y = B - shared @ B / len(B), Y - shared @ Y / len(Y)
        found = fold.moments(W)
        assert found.rows == len(B)
        H, C = B.T @ (shared[:, None] * B), B.T @ (shared[:, None] * Y)
        torch.testing.assert_close(found.H, H, rtol=1e-4, atol=1e-5 * float(found.H.diagonal().max()))
        torch.testing.assert_close(found.C, C, rtol=1e-4, atol=1e-5 * float(found.C.abs().max()))
        assert found.t == pytest.approx(float(shared @ Y.square().sum(1)), rel=1e-4)


def unbiased(model, block, outputs):
    """Outputs of a consumer without its bias."""
    bias = model.get_submodule(block.consumer).bias
    return outputs if bias is None else outputs - bias.detach().double()


def changed(model, block):
    """Half of a block, with weights that change the blocks behind it."""
    kept = torch.arange(max(1, block.units // 2))
    W = weight_matrix(model.get_submodule(block.consumer))
    return shrink(model, block, kept, weight=1.5 * W[block.columns[kept].flatten().sort().values])


def walked(calibration, segments, variant, edits=()):
    """Each block with its moments; the caller may shrink it before the next one comes."""
    owners = {block.name: 0 for segment in segments.segments for block in segment.blocks}
    steps = walk(variant, calibration, segments, owners, beforehand=dict(edits))
    for segment in steps.left:
        steps.start(segment)
        for group in groups_of(segment.blocks):
            moments = steps.moments(group.blocks)
            yield from ((block, moments[block.name]) for block in group.blocks)
        steps.finish(segment)


def run(model, calibration, blocks, variant, inspect):
    """Collect, let `inspect` look at each block, and change it; tied blocks are changed before where streams run."""
    edits = {}
    if variant != "layer":
        edits = {block.name: changed(model, block) for block in blocks if block.tie}
        blocks = [block for block in blocks if not block.tie]
    for block, moments in walked(calibration, plan(calibration, blocks), variant, edits):
        inspect(block, moments)
        edits[block.name] = changed(model, block)
    return edits


@pytest.mark.parametrize("family", ["bert", "llama", "t5", "albert", "vit"])
def test_layer_collects_the_original_model_s_moments(family):
    model, calibration, blocks, segments = prepared(family)
    original, *_ = prepared(family)
    places, found = find_additions(calibration, segments), []

    def inspect(block, moments):
        found.append(block.name)
        check(moments, original, calibration, block, places[block.name])

    run(model, calibration, blocks, "layer", inspect)
    assert sorted(found) == sorted(b.name for b in blocks)


def test_tokens_with_massive_activations_count_as_the_norm_behind_sees_them():
    def massive():
        model, calibration, blocks, segments = prepared("llama")
        with torch.no_grad():
            model.get_input_embeddings().weight[::3] *= 1000  # a token in three
        return model, calibration, blocks, segments

    model, calibration, blocks, segments = massive()
    original, *_ = massive()
    places = find_additions(calibration, segments)

    def inspect(block, moments):
        assert float(shares(original, calibration, places[block.name]).min()) < 0.01
        check(moments, original, calibration, block, places[block.name])

    run(model, calibration, blocks, "layer", inspect)


@pytest.mark.parametrize("family", ["bert", "llama", "t5", "mpnet"])
def test_seq_collects_the_moments_of_the_model_as_pruned_so_far(family):
    model, calibration, blocks, segments = prepared(family)
    places = find_additions(calibration, segments)

    def inspect(block, moments):
        check(moments, model, calibration, block, places[block.name])

    run(model, calibration, blocks, "seq", inspect)


@pytest.mark.parametrize("family", ["bert", "llama", "t5", "mpnet"])
def test_asym_pairs_pruned_inputs_with_original_targets(family):
    model, calibration, blocks, segments = prepared(family)
    original, *_ = prepared(family)
    places = find_additions(calibration, segments)

    def inspect(block, moments):
        def target(samples):
            return unbiased(original, block, rows(original, samples, block.consumer, output=True))

        check(moments, model, calibration, block, places[block.name], target)

    run(model, calibration, blocks, "asym", inspect)


def test_every_row_counts_alike_where_no_norm_follows(monkeypatch):
    monkeypatch.setattr(additions, "_TOKEN_NORM", re.compile("no such norm"))
    model, calibration, blocks, _ = prepared("llama")
    block, moments = next(walked(calibration, plan(calibration, blocks), "layer"))
    for number, fold in enumerate(moments.folds):
        B = rows(model, replace(calibration, fit=calibration.fit[number::2]), block.consumer)
        H = fold.moments(weight_matrix(model.get_submodule(block.consumer))).H
        torch.testing.assert_close(H, B.T @ B, rtol=1e-4, atol=1e-5 * float(H.diagonal().max()))


RESIDUALS = {  # modules that read what the consumer's output is added to
    "bert": {"attention": "", "mlp": "intermediate"},
    "llama": {"attention": "input_layernorm", "mlp": "post_attention_layernorm"},
}


@pytest.mark.parametrize("family", RESIDUALS)
def test_residual_adds_to_the_targets_what_the_residual_stream_has_lost(family):
    model, calibration, blocks, segments = prepared(family)
    original, *_ = prepared(family)
    places, lost = find_additions(calibration, segments), []

    def inspect(block, moments):
        layer = re.match(r".*layers?\.\d+", block.name).group()
        path = f"{layer}.{RESIDUALS[family][block.kind]}".rstrip(".")

        def target(samples):
            rest = rows(original, samples, path) - rows(model, samples, path)
            lost.append(float(rest.norm()))
            return unbiased(original, block, rows(original, samples, block.consumer, output=True)) + rest

        check(moments, model, calibration, block, places[block.name], target)

    run(model, calibration, blocks, "residual", inspect)
    assert lost[:2] == [0, 0] and all(lost[2:])


def test_residual_is_asym_where_outputs_are_normalised_before_they_are_added():
    sums = {}
    for variant in ("asym", "residual"):
        model, calibration, blocks, _ = prepared("gemma2")
        blocks = [block for block in blocks if block.kind == "mlp"]

        def inspect(block, moments, variant=variant):
            sums.setdefault(block.name, {})[variant] = moments.folds[0].sums()

        run(model, calibration, blocks, variant, inspect)
    for found in sums.values():
        for one, other in zip(found["asym"], found["residual"], strict=True):
            assert torch.equal(one, other)


def test_folds_split_the_batches_and_the_held_out_ones_stay_apart():
    _, calibration, _, segments = prepared("bert")
    _, moments = next(walked(calibration, segments, "layer"))
    tokens = [int(batch["attention_mask"].sum()) for batch in calibration.fit]
    assert [fold.rows for fold in moments.folds] == [sum(tokens[0::2]), sum(tokens[1::2])]
    assert moments.held_out.rows == sum(int(batch["attention_mask"].sum()) for batch in calibration.held_out)


@pytest.mark.parametrize("variant", ["layer", "seq", "asym", "residual"])
def test_activations_that_are_not_finite_name_the_block_and_the_sample(variant):
    model = tiny("vit")
    batches = ready_batches(model)
    batches[1]["pixel_values"][2] = float("nan")
    calibration = read(model, batches, CONFIG)
    blocks = discover(model).blocks
    segments = plan(Samples.of(model, ready_batches(model, count=1)), blocks)
    with pytest.raises(ValueError, match=rf"{blocks[0].name}.*NaN or inf.*samples? .*2"):
        next(walked(calibration, segments, variant))


def test_tokens_of_two_models_that_cannot_be_paired_are_refused():
    """As in speech synthesis, where predicted durations decide on lengths."""
    model, calibration, blocks, segments = prepared("llama")
    steps = walked(calibration, segments, "asym")
    next(steps)  # by now the targets of the layer are there
    module = model.model.layers[0].mlp
    run = module.forward
    module.forward = lambda hidden: functional.pad(run(hidden[:, 1:]), (0, 0, 1, 0))
    with pytest.raises(
        ValueError, match=rf"{blocks[1].name}.* reads \d+ tokens of batch 0 .*but \d+ .*variant='layer'"
    ):
        next(steps)


def test_sums_of_wide_blocks_take_half_the_memory_and_hold_six_digits(monkeypatch):
    _, calibration, _, segments = prepared("llama")

    def sums():
        return {b.name: m for b, m in walked(calibration, segments, "layer")}

    expected = sums()
    wide = max(len(moments.held_out.sums()[1]) for moments in expected.values())
    monkeypatch.setattr("hf_subprune.collection.block_moments._DOUBLE_UP_TO", wide - 1)
    for name, found in sums().items():
        for one, other in zip(
            (*found.folds, found.held_out), (*expected[name].folds, expected[name].held_out), strict=True
        ):
            gram, exact = one.sums()[0], other.sums()[0]
            assert gram.dtype == (torch.float32 if len(gram) == wide else torch.float64)
            assert float((gram - exact).norm() / exact.norm()) < 1e-6
