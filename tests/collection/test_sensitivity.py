import copy
import functools

import pytest
import torch
from batches import ready_batches
from tiny import tiny
from transformers.pytorch_utils import Conv1D

from hf_subprune.collection import sensitivity
from hf_subprune.collection.planning import plan
from hf_subprune.collection.sensitivity import activation_gradients, entries_at_once, output_metrics
from hf_subprune.coverage.tiny import tiny_model
from hf_subprune.data import batches as batching
from hf_subprune.data.batches import Samples
from hf_subprune.data.padding import token_mask
from hf_subprune.discovery.discover import discover


def padded_batches(model):
    """Two batches of two short samples, the first with two tokens of padding."""
    ids = [batch["input_ids"][:2, :5] for batch in ready_batches(model)[:2]]
    mask = torch.ones_like(ids[0])
    mask[0, -2:] = 0
    return [{"input_ids": x, "attention_mask": mask} for x in ids]


def outputs_as_a_function_of_errors(model, consumer, batch):
    """The model's output as a function of an error added to one consumer's output, and that output's shape."""
    shapes = []

    def run(error):
        def add(_module, _args, output):
            shapes.append(output.shape)
            return output if error is None else output + error

        hook = model.get_submodule(consumer).register_forward_hook(add)
        try:
            return model(**batch)
        finally:
            hook.remove()

    run(None)
    return run, shapes[0]


def exact_metric(model, block, batches, output_rows):
    """Mean over the consumer's tokens of `J' G J`, from full Jacobians, one output row after the other."""
    m = model.get_submodule(block.consumer).weight.shape[0]
    if isinstance(model.get_submodule(block.consumer), Conv1D):
        m = model.get_submodule(block.consumer).weight.shape[1]
    total, rows = torch.zeros(m, m, dtype=torch.float64), 0
    for batch in batches:
        run, shape = outputs_as_a_function_of_errors(model, block.consumer, batch)
        inputs = token_mask(model, block.consumer, batch, shape)
        keep = torch.ones(shape[:-1], dtype=torch.bool).flatten() if inputs is None else inputs
        rows += int(keep.sum())
        compared = functools.partial(lambda e, run, batch: output_rows(run(e), batch), run=run, batch=batch)
        jacobian = torch.autograd.functional.jacobian(compared, torch.zeros(shape), vectorize=True)
        jacobian = jacobian.flatten(0, 1).flatten(1, -2)[:, keep]  # (outputs, tokens, m)
        total += torch.einsum("otm,otn->mn", jacobian.double(), jacobian.double())
    return total / rows


def fisher_rows(model):
    def rows(output, batch):
        log_p = output.logits.reshape(-1, output.logits.shape[-1])
        mask = token_mask(model, "", batch, output.logits.shape)
        log_p = (log_p if mask is None else log_p[mask]).log_softmax(1)
        return log_p * log_p.detach().exp().sqrt()  # sum over y of p(y) times the square is then the expectation

    return rows


def hidden_rows(model):
    def rows(output, batch):
        hidden = output.last_hidden_state
        mask = token_mask(model, "", batch, hidden.shape)
        return hidden.reshape(-1, hidden.shape[-1])[mask]

    return rows


@pytest.fixture
def all_samples(monkeypatch):
    monkeypatch.setattr(sensitivity, "_ROWS_AN_OUTPUT", 10**9)


def centred_rows(output, _batch):
    return output.logits - output.logits.mean(1, keepdim=True)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_logits_give_the_metric_of_full_jacobians(family, all_samples):
    one, narrow = {"bert": ("num_hidden_layers", "hidden_size"), "gpt2": ("n_layer", "n_embd")}[family]
    model = tiny(family, **{one: 1, narrow: 24}, vocab_size=60).eval()
    batches = padded_batches(model)
    block = discover(model, batches[0]).blocks[1]
    rows = centred_rows if model(**batches[0]).logits.ndim == 2 else fisher_rows(model)
    expected = exact_metric(model, block, batches, rows)
    found = output_metrics(Samples.of(model, batches), [block], probes=200)[block.name]
    assert (found - expected).norm() < 0.25 * expected.norm()


def test_calls_that_a_model_runs_without_gradients_are_passed_over(all_samples):
    """As recurrent models run all rounds but the last."""
    model = tiny("bert").eval()
    batches = padded_batches(model)
    blocks = discover(model, batches[0]).blocks[:2]
    expected = output_metrics(Samples.of(model, batches), blocks)
    layer = model.bert.encoder.layer[0]
    run = layer.forward

    def twice(*args, **kwargs):
        with torch.no_grad():
            run(*args, **kwargs)
        return run(*args, **kwargs)

    layer.forward = twice
    found = output_metrics(Samples.of(model, batches), blocks)
    for block in blocks:
        assert expected[block.name].norm() > 0
        torch.testing.assert_close(found[block.name], expected[block.name])


def test_hidden_states_give_gauss_newton_of_full_jacobians(all_samples):
    model = tiny("bert", num_hidden_layers=1, hidden_size=24).eval().base_model
    batches = padded_batches(model)
    block = discover(model, batches[0]).blocks[1]
    expected = exact_metric(model, block, batches, hidden_rows(model))
    found = output_metrics(Samples.of(model, batches), [block], probes=100)[block.name]
    assert (found - expected).norm() < 0.25 * expected.norm()


@pytest.mark.parametrize(("wanted", "rounds"), [(0, 1), (10**9, 4)])
def test_more_samples_are_looked_at_until_there_are_rows_enough(monkeypatch, wanted, rounds):
    monkeypatch.setattr(sensitivity, "_ROWS_AN_OUTPUT", wanted)
    model = tiny("llama").eval()
    batch = {"input_ids": torch.randint(0, 50, (8, 6))}
    seen = []
    model.register_forward_pre_hook(lambda _m, _a, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True)
    output_metrics(Samples.of(model, [batch]), discover(model, batch).blocks[:1])
    looked_at = torch.cat(seen[-rounds:])
    assert [len(part) for part in seen[-rounds:]] == [2] * rounds
    assert all(any(torch.equal(row, sample) for sample in batch["input_ids"]) for row in looked_at)
    assert len(looked_at.unique(dim=0)) == 2 * rounds


def test_all_long_texts_are_heard_of_a_part_each_in_another_place_each_round(monkeypatch):
    monkeypatch.setattr(sensitivity, "_ROWS_AN_OUTPUT", 10**9)
    rounds, length = 7, 64 * 7
    model = tiny("llama", max_position_embeddings=length).eval()
    shape = 2, length
    batches = [{"input_ids": torch.randint(0, 50, shape), "attention_mask": torch.ones(shape)} for _ in range(2)]
    blocks = discover(model, batches[0]).blocks[:1]
    seen = []
    model.register_forward_pre_hook(lambda _m, _a, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True)
    output_metrics(Samples.of(model, batches), blocks)
    assert [part.shape for part in seen] == [(2, 64)] * (2 * rounds)
    for number, batch in enumerate(batches):
        parts = seen[number::2]
        order = [(number + part) % rounds for part in range(rounds)]
        assert torch.equal(torch.cat([parts[order.index(place)] for place in range(rounds)], 1), batch["input_ids"])


@pytest.mark.parametrize("why", ["padding", "an encoder", "positions of all"])
def test_texts_that_are_none_in_parts_are_looked_at_whole(why):
    length = 64 * 7
    model = tiny("bert" if why == "an encoder" else "llama", max_position_embeddings=length).eval()
    shape = 8, length
    batch = {"input_ids": torch.randint(5, 50, shape), "attention_mask": torch.ones(shape, dtype=torch.long)}
    blocks = discover(model, batch).blocks[:1]
    if why == "padding":
        batch["attention_mask"][0, -1] = 0
    if why == "positions of all":
        batch["attention_mask"] = torch.ones(8, 1, length, length, dtype=torch.bool).tril()
    seen = []
    model.register_forward_pre_hook(lambda _m, _a, kwargs: seen.append(kwargs["input_ids"].shape), with_kwargs=True)
    output_metrics(Samples.of(model, [batch]), blocks)
    assert seen == [(2, length)]


@pytest.mark.parametrize("at_once", [1, 2])
def test_tokens_that_a_backward_is_of_are_those_whose_logits_are_made_at_once(monkeypatch, at_once):
    length = 64 * 7
    model = tiny("llama", max_position_embeddings=length).eval()
    samples = Samples.of(model, [{"input_ids": torch.randint(0, 50, (2, length))} for _ in range(2)])
    monkeypatch.setattr(batching, "_LOGITS_AT_ONCE", at_once * 64 * model.config.vocab_size)
    blocks, seen = discover(model, samples.fit[0]).blocks[:1], []
    model.register_forward_pre_hook(lambda _m, _a, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True)
    output_metrics(samples, blocks)
    assert {entries_at_once(samples)} == {at_once * 64} == set(seen)


def test_an_encoder_that_has_rows_enough_runs_no_more_for_its_decoder(monkeypatch):
    model = tiny("t5").eval()
    monkeypatch.setattr(sensitivity, "_ROWS_AN_OUTPUT", 20 / model.config.d_model)
    batch = {"input_ids": torch.randint(5, 50, (8, 16)), "decoder_input_ids": torch.randint(5, 50, (8, 2))}
    blocks = [block for block in discover(model, batch).blocks if block.kind == "mlp"]
    heard = []
    model.encoder.block[0].register_forward_pre_hook(lambda _module, args: heard.append(len(args[0])))
    found = output_metrics(Samples.of(model, [batch]), blocks)
    assert heard == [2]
    for block in blocks:
        _, rows, _ = found.parts[block.name]
        assert rows == (32 if "encoder" in block.name else 16), block.name  # of two samples, once and four times
        assert found[block.name].norm() > 0
        if "decoder" in block.name:
            assert torch.linalg.matrix_rank(found[block.name]) > 8, block.name  # other draws each time


def test_each_batch_has_draws_of_its_own(monkeypatch):
    monkeypatch.setattr(sensitivity, "_ROUNDS", 1)
    model = tiny("llama").eval()
    batch = {"input_ids": torch.randint(5, 50, (1, 3))}
    blocks = discover(model, batch).blocks[-1:]
    found = output_metrics(Samples.of(model, [batch] * 4), blocks)[blocks[0].name]
    assert torch.linalg.matrix_rank(found) > 6  # of the same rows four times


def test_padding_counts_for_nothing():
    model = tiny("llama").eval()
    batch = ready_batches(model)[0]
    block = discover(model, batch).blocks[0]
    wide = {"input_ids": torch.nn.functional.pad(batch["input_ids"], (0, 5))}
    wide["attention_mask"] = torch.nn.functional.pad(torch.ones_like(batch["input_ids"]), (0, 5))
    alone = {"input_ids": batch["input_ids"], "attention_mask": torch.ones_like(batch["input_ids"])}
    first, second = (output_metrics(Samples.of(model, [b]), [block], seed=3)[block.name] for b in (alone, wide))
    torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-4 * float(first.abs().max()))


def test_nothing_about_the_model_changes():
    model = tiny("bert").train()
    model.bert.embeddings.word_embeddings.weight.requires_grad_(False)
    batches = ready_batches(model)[:2]
    blocks = discover(model, batches[0]).blocks
    state, flags = copy.deepcopy(model.state_dict()), [p.requires_grad for p in model.parameters()]
    random = torch.random.get_rng_state()
    metrics = output_metrics(Samples.of(model, batches), blocks)
    assert torch.equal(random, torch.random.get_rng_state())
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    for M in metrics.values():
        assert torch.equal(M, M.T)
        assert float(torch.linalg.eigvalsh(M)[0]) > -1e-6 * float(M.diagonal().sum())
        assert float(M.diagonal().sum()) > 0


def test_wide_outputs_are_looked_at_in_parts(monkeypatch):
    model = tiny("llama").eval()
    samples = Samples.of(model, ready_batches(model)[:1])
    block = discover(model, samples.fit[0]).blocks[0]
    expected = output_metrics(samples, [block])[block.name]
    classes = model.config.vocab_size
    monkeypatch.setattr(sensitivity, "_NUMBERS_AT_ONCE", 3 * classes)
    torch.testing.assert_close(output_metrics(samples, [block])[block.name], expected)


def test_the_seed_decides_the_draws():
    model = tiny("llama").eval()
    batches = ready_batches(model)[:1]
    block = discover(model, batches[0]).blocks[0]
    first, second, other = (output_metrics(Samples.of(model, batches), [block], seed=s)[block.name] for s in (0, 0, 1))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_activation_gradients_are_those_at_the_consumer_s_input(monkeypatch, family):
    monkeypatch.setattr(sensitivity, "_ROUNDS", 1)
    model = tiny(family)
    batches = padded_batches(model)
    blocks = discover(model).blocks
    samples = Samples.of(model, batches)
    found = activation_gradients(samples, blocks, seed=3)
    for block in blocks:
        consumer = model.get_submodule(block.consumer)
        total, rows = 0.0, 0
        for number, batch in enumerate(batches):
            seen = []
            hook = consumer.register_forward_pre_hook(lambda _m, args, seen=seen: seen.append(args[0]))
            output = model(**batch)
            hook.remove()
            compared, direction = sensitivity._probe(samples, batch, output, sensitivity._generator(3, 0, number))
            (gradient,) = torch.autograd.grad(compared, seen, direction)
            mask = token_mask(model, block.consumer, batch, seen[0].shape)
            kept = slice(None) if mask is None else mask
            product = (seen[0] * gradient).abs().flatten(0, -2)[kept].detach().double()
            total, rows = total + product.sum(0), rows + len(product)
        torch.testing.assert_close(found[block.name], total / rows, rtol=1e-4, atol=1e-9)


def caching():
    """A model whose forward takes no `use_cache`: only its configs say whether it keeps keys and values."""
    torch.manual_seed(0)
    model = tiny_model("switch_transformers", "main").eval()
    for part in (model, model.decoder):
        part.config.use_cache = True
    return model


@pytest.mark.parametrize("make", [*(functools.partial(tiny, name) for name in ("llama", "bert", "t5")), caching])
def test_layers_that_run_once_more_in_the_backward_change_nothing(make):
    model = make()
    configs = {
        name: copy.deepcopy(module.config) for name, module in model.named_modules() if hasattr(module, "config")
    }
    batches = ready_batches(model)
    samples = Samples.of(model, batches)
    # A few samples do not reach each expert.
    blocks = [block for block in discover(model, batches[0]).blocks if ".experts." not in block.name]
    recomputed = [segment.path for segment in plan(samples, blocks).segments]
    plain, again = output_metrics(samples, blocks), output_metrics(samples, blocks, recomputed=recomputed)
    assert recomputed and plain.keys() == again.keys()
    for block in plain:
        torch.testing.assert_close(again[block], plain[block], rtol=1e-4, atol=1e-9)
    assert all(model.get_submodule(name).config.to_dict() == config.to_dict() for name, config in configs.items())
