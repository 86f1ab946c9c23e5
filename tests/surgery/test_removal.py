"""Blocks that keep no unit: what is left of them in the model that computes, generates, learns and is exported."""

import pytest
import torch
from same import assert_same_weights
from tiny import tiny

from hf_subprune.discovery.discover import discover
from hf_subprune.discovery.probe_inputs import probe_inputs
from hf_subprune.surgery.edits import shrink, undo_all
from hf_subprune.surgery.masking import mask
from hf_subprune.surgery.verification import verify

PROMPT = torch.tensor([[5, 9, 7, 11], [3, 8, 21, 4]])


def removable(model, kind=None):
    return [block for block in discover(model).blocks if block.removable and kind in (None, block.kind)]


def remove(model, blocks):
    return {block.name: shrink(model, block, []) for block in blocks}


def output(model):
    with torch.no_grad():
        return model(**probe_inputs(model))[0]


def generated(model, **settings):
    return model.generate(
        PROMPT, attention_mask=torch.ones_like(PROMPT), do_sample=False, max_new_tokens=6, min_new_tokens=6, **settings
    )


@pytest.mark.parametrize("family", ["llama", "llama_mqa", "gpt2", "opt", "bert", "vit", "t5", "whisper"])
def test_a_model_without_blocks_computes_what_it_does_with_their_units_masked(family):
    model, twin = tiny(family), tiny(family)
    whole, before = output(model), dict(model.named_parameters())
    found = removable(model)
    ties = {block.tie for block in found[::2]} - {None}
    blocks = [block for i, block in enumerate(found) if i % 2 == 0 or block.tie in ties]
    edits = remove(model, blocks)
    for block in blocks:
        mask(twin, block, [])
    torch.testing.assert_close(output(model), output(twin))
    assert not torch.equal(output(model), whole)
    gone = output(model)
    undo_all(edits)
    assert all(p is before[name] for name, p in model.named_parameters())
    torch.testing.assert_close(output(model), whole)
    for edit in edits.values():
        edit.redo()
    torch.testing.assert_close(output(model), gone)


def test_nothing_is_called_but_the_consumer_and_it_gives_its_bias():
    model = tiny("phi")
    block = removable(model, "attention")[0]
    consumer, bias = model.get_submodule(block.consumer), torch.arange(48.0)
    shrink(model, block, [], torch.empty(0, 48), bias)
    attention = model.get_submodule(block.owner)
    called = []
    for name, module in attention.named_modules():
        module.register_forward_hook(lambda _m, _a, _o, name=name: called.append(name))
    given = torch.randn(2, 5, 48)
    output, weights = attention(given, position_embeddings=None, attention_mask=None)
    assert called == ["dense", ""] and weights is None
    assert torch.equal(output, bias.expand(2, 5, 48))
    assert [p.numel() for name, p in attention.named_parameters() if name != "dense.bias"].count(0) == 7
    assert consumer.in_features == 0 and consumer.weight.shape == (48, 0)


def test_keys_that_all_heads_share_go_with_them():
    model = tiny("llama_mqa")
    block = removable(model, "attention")[0]
    shrink(model, block, [])
    assert sum(p.numel() for p in model.get_submodule(block.owner).parameters()) == 0


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "gpt_neo", "opt"])
@pytest.mark.parametrize("layers", [[0], [-1], [0, -1], [0, 1]])
def test_generation_is_the_same_with_and_without_a_cache(family, layers):
    model = tiny(family)
    attention = removable(model, "attention")
    remove(model, [attention[layer] for layer in layers])
    tokens = generated(model, use_cache=False)
    assert torch.equal(generated(model), tokens)
    assert torch.equal(generated(model, num_beams=2), generated(model, num_beams=2, use_cache=False))


def test_generation_is_the_same_with_a_static_cache():
    model = tiny("llama")
    remove(model, removable(model, "attention")[:2])
    tokens = generated(model, use_cache=False)
    assert torch.equal(generated(model, cache_implementation="static", disable_compile=True), tokens)


def test_an_encoder_decoder_generates_the_same_without_either_attention_of_its_first_layer():
    model = tiny("bart")
    decoder = [block for block in removable(model, "attention") if ".decoder.layers.0." in block.name]
    assert len(decoder) == 2
    remove(model, decoder)
    assert torch.equal(generated(model), generated(model, use_cache=False))


def test_what_is_left_of_a_model_learns_and_is_exported():
    model = tiny("llama")
    blocks = removable(model)
    remove(model, [blocks[0], blocks[3]])
    model.train()
    model(PROMPT, labels=PROMPT, use_cache=False).loss.backward()
    left = [p for p in model.parameters() if p.numel() > 0]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in left)
    optimizer = torch.optim.AdamW(model.parameters())
    before = [p.detach().clone() for p in left]
    optimizer.step()
    assert not any(torch.equal(p, old) for p, old in zip(left, before, strict=True))
    model.eval()
    model.config.use_cache = False
    exported = torch.export.export(model, (PROMPT,), strict=False).module()
    torch.testing.assert_close(exported(PROMPT)[0], model(PROMPT)[0])


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_blocks_that_are_gone_are_not_there_when_a_model_is_looked_at_again(family):
    model = tiny(family)
    found = discover(model)
    gone = {block.name for block in found.blocks[:3]}
    remove(model, found.blocks[:3])
    again = discover(model)
    assert [b.name for b in again.blocks] == [b.name for b in found.blocks if b.name not in gone]
    assert again.refusals == found.refusals
    verify(model, again.blocks, {block.name: [] for block in again.blocks}, probe_inputs(model))


@pytest.mark.parametrize(
    ("family", "kind", "reason"),
    [("resnet", "channels", "convolution"), ("bloom", "attention", "does not compute the same without it")],
)
def test_blocks_that_must_keep_a_unit_say_why(family, kind, reason):
    model, twin = tiny(family), tiny(family)
    block = next(block for block in discover(model).blocks if block.kind == kind)
    for act in (shrink, mask):
        with pytest.raises(ValueError, match=f"{block.name}.*must keep a unit.*{reason}"):
            act(model, block, [])
    assert_same_weights(model, twin)


def test_query_heads_do_not_go_without_their_keys():
    model = tiny("llama")
    block = removable(model, "attention")[0]
    with pytest.raises(ValueError, match="remove the block of these"):
        shrink(model, block.queries, [])
