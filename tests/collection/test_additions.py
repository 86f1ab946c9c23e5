import pytest
import torch
from batches import ready_batches
from tiny import tiny

from hf_subprune.collection.additions import find_additions
from hf_subprune.collection.planning import plan
from hf_subprune.data.batches import Samples
from hf_subprune.discovery.discover import discover
from hf_subprune.models.running import call


def additions(family):
    model = tiny(family)
    (batch,) = ready_batches(model, count=1)
    blocks = discover(model, batch).blocks
    return model, batch, blocks, find_additions(Samples.of(model, [batch]), plan(Samples.of(model, [batch]), blocks))


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "vit", "t5", "whisper", "resnet"])
def test_what_is_added_does_not_depend_on_the_consumer(family):
    model, batch, blocks, found = additions(family)
    residual = [block for block in blocks if block.kind != "channels"] or blocks
    assert (residual and {block.name for block in residual} <= set(found)) or (family == "resnet" and found)
    for block in blocks:
        if block.name not in found:
            continue
        addition, consumer = found[block.name], model.get_submodule(block.consumer)
        rests = []
        for factor in (1.0, 0.3):
            seen = {}

            def scaled(_module, _args, output, factor=factor, seen=seen):
                seen["output"] = factor * output
                return seen["output"].clone()

            def note(_module, args, *output, seen=seen, is_input=addition.is_input):
                if "output" in seen and "value" not in seen:
                    value = args[0] if is_input else output[0]
                    seen["value"] = (value if isinstance(value, torch.Tensor) else value[0]).clone()

            module = model.get_submodule(addition.path)
            hooks = [
                consumer.register_forward_hook(scaled),
                module.register_forward_pre_hook(note) if addition.is_input else module.register_forward_hook(note),
            ]
            call(model, batch)
            for hook in hooks:
                hook.remove()
            rests.append(addition.rest(seen["value"], seen["output"]))
        assert rests[0].abs().max() > 0
        torch.testing.assert_close(*rests, rtol=1e-4, atol=1e-4 * float(rests[0].abs().max()))


def test_outputs_that_are_normalised_first_have_none():
    _, _, blocks, found = additions("gemma2")
    assert blocks and not found


def test_consumers_that_are_called_again_before_they_are_added_have_none():
    """As Pegasus-X does: its second call is of global tokens."""
    model = tiny("bert")
    (batch,) = ready_batches(model, count=1)
    blocks = discover(model, batch).blocks
    before = set(find_additions(Samples.of(model, [batch]), plan(Samples.of(model, [batch]), blocks)))
    module = model.bert.encoder.layer[1].output

    def again(hidden, rest):
        output = module.dense(hidden)
        module.dense(hidden[:, :2])
        return module.LayerNorm(output + rest)

    module.forward = again
    assert before - set(find_additions(Samples.of(model, [batch]), plan(Samples.of(model, [batch]), blocks))) == {
        "bert.encoder.layer.1.mlp"
    }


def test_the_model_is_as_before():
    model = tiny("bert").train()
    (batch,) = ready_batches(model, count=1)
    blocks = discover(model, batch).blocks
    find_additions(Samples.of(model, [batch]), plan(Samples.of(model, [batch]), blocks))
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
