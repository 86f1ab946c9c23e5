import time
from contextlib import contextmanager

import pytest
import torch
from small_models import SIZES, make_batches, make_bert, make_llama
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    ViTConfig,
    ViTModel,
)

from hf_subprune.evaluation.costs import (
    circumstances,
    count_macs,
    count_parameters,
    measure_in_turn,
    measure_latency,
    times_in_turn,
)
from hf_subprune.evaluation.outputs import model_outputs


def test_tied_parameters_count_once():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=30, n_positions=8, n_embd=16, n_layer=1, n_head=2))
    assert count_parameters(model) == sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())
    assert model.lm_head.weight is model.transformer.wte.weight


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("masked", [False, True])
def test_macs_are_those_of_one_sample(attention, masked):
    model = make_bert(attn_implementation=attention)
    batch = make_batches(1, length=7)[0]
    if not masked:
        del batch["attention_mask"]
    projections, feed_forward, scores = 4 * 7 * 16 * 16, 2 * 7 * 16 * 24, 2 * 7 * 7 * 16
    pooler = 16 * 16
    assert count_macs(model, batch) == 2 * (projections + feed_forward + scores) + pooler


def test_macs_of_grouped_heads_do_not_depend_on_the_implementation():
    model, batch = make_llama(), make_batches(1)[0]
    fused = count_macs(model, batch)
    model.set_attn_implementation("eager")
    assert fused == count_macs(model, batch) > 0


def test_batches_that_cannot_be_cut_are_counted_whole():
    model, batch = make_bert(), make_batches(1)[0]
    one = count_macs(model, batch)
    assert count_macs(model, {**batch, "position_ids": torch.arange(7)[None]}) == 3 * one


def test_latency_is_in_seconds_and_depends_on_what_is_said():
    model, batch = make_bert(), make_batches(1)[0]
    assert 0 < measure_latency(model, batch, min_run_time=0.01) < 1
    expected = {"batch_size": 3, "length": 7, "device": "cpu", "dtype": "float32", "threads": torch.get_num_threads()}
    assert circumstances(model, batch) == expected


def test_a_changed_model_is_timed_in_turn_with_itself():
    model, order, now = make_bert(), [], ["outside"]
    model.register_forward_hook(lambda *_: order.append(now[-1]))

    @contextmanager
    def changed():
        now.append("inside")
        model.register_forward_hook(lambda *_: time.sleep(0.02))
        yield
        now.pop()
        model._forward_hooks.popitem()

    found = times_in_turn(model, make_batches(1)[0], changed, min_run_time=0.0)
    assert order == ["outside", "inside"] * 4  # the first turn warms up
    assert found.inside >= found.outside + 0.01
    assert 1 < found.ratios[0] <= found.ratios[1]


def test_models_are_timed_in_turn():
    order = []
    models = [make_bert(), make_bert()]
    for i, model in enumerate(models):
        model.register_forward_hook(lambda *_, i=i: order.append(i))
    times = measure_in_turn(models, make_batches(1)[0], rounds=2)
    assert order == [0, 1] * 3  # the first round warms up
    assert [len(row) for row in times] == [2, 2] and all(0 < t < 1 for row in times for t in row)


def test_images_have_no_length():
    model = ViTModel(ViTConfig(image_size=16, patch_size=8, **SIZES)).eval()
    batch = {"pixel_values": torch.zeros(2, 3, 16, 16)}
    assert circumstances(model, batch)["length"] is None
    assert count_macs(model, batch) > 0


def test_measuring_changes_nothing():
    model, batch = make_bert().train(), make_batches(1)[0]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    count_macs(model, batch)
    measure_latency(model, batch, min_run_time=0.01)
    model_outputs(model, [batch])
    assert model.training
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
