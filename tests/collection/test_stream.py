import pytest
import torch
from tiny import tiny
from torch import nn

from hf_subprune.blocks import Block
from hf_subprune.collection.planning import plan
from hf_subprune.collection.stream import Stream
from hf_subprune.data.batches import Samples
from hf_subprune.discovery.probe_inputs import probe_inputs
from hf_subprune.models.running import call


def block(consumer):
    return Block(consumer, "mlp", consumer, torch.zeros(1, 1, dtype=torch.long), (), (), 0)


def consumers(model, *endings):
    return [block(name) for name, _ in model.named_modules() if name.endswith(endings)]


class Skips(nn.Module):
    """The last layer reads what the first one returned, as in a U-Net."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4)) for _ in range(3))

    def forward(self, x):
        first = self.layers[0](x)
        return self.layers[2](self.layers[1](first) + first)


class Grows(nn.Module):
    """The last layer reads what all others returned, of different widths, as a decoder of feature maps does."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(*sizes)) for sizes in ((4, 4), (4, 6), (10, 4)))
        self.norm = nn.LayerNorm(4)

    def forward(self, x):
        first = self.layers[0](x)
        second = self.layers[1](first)
        return self.layers[2](torch.cat([self.norm(first), second], -1))


class Reused(nn.Module):
    """One layer is called twice."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4)])

    def forward(self, x):
        return self.layers[0](self.layers[0](x))


class Stem(nn.Module):
    """A stem before the layers, the second of which is no segment; what the third reads of the stem is for a test."""

    def __init__(self, read_again):
        super().__init__()
        self.read_again = read_again
        self.stem, self.mask = nn.Linear(4, 4), nn.Linear(4, 4)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4)) for _ in range(3))

    def forward(self, x):
        first, mask = self.stem(x), self.mask(x)
        first[x < 0] = 0.0
        hidden = self.layers[1](self.layers[0](first))
        return self.layers[2](hidden + first if self.read_again else hidden) + mask


@pytest.mark.parametrize(
    ("family", "endings", "paths"),
    [
        ("bert", ("output.dense",), [f"bert.encoder.layer.{i}" for i in range(2)]),
        ("llama", ("down_proj", "o_proj"), [f"model.layers.{i}" for i in range(2)]),
        ("t5", (".wo", ".o"), [f"{side}.block.{i}" for side in ("encoder", "decoder") for i in range(2)]),
        (
            "bart",
            ("fc2", "out_proj"),
            [f"model.{side}.layers.{i}" for side in ("encoder", "decoder") for i in range(2)],
        ),
        ("albert", ("ffn_output",), ["albert.encoder"]),
    ],
)
def test_segments_are_the_layers_in_forward_order(family, endings, paths):
    model = tiny(family)
    found = plan(Samples.of(model, [probe_inputs(model)]), consumers(model, *endings))
    assert [segment.path for segment in found.segments] == paths
    assert not found.retain_all


@pytest.mark.parametrize("family", ["bert", "llama", "gpt_neox", "t5", "bart", "gemma2", "albert", "clip"])
def test_every_consumer_sees_what_it_sees_in_a_plain_forward(family):
    model = tiny(family)
    batch = probe_inputs(model)
    blocks = consumers(model, "output.dense", "down_proj", ".wo", "fc2", "dense_4h_to_h", "ffn_output")
    paths = [b.consumer for b in blocks]
    assert paths

    plain = {path: [] for path in paths}
    hooks = [
        model.get_submodule(p).register_forward_pre_hook(lambda _m, a, p=p: plain[p].append(a[0].clone()))
        for p in paths
    ]
    call(model, batch)
    for hook in hooks:
        hook.remove()

    stream = Stream(Samples.of(model, [batch]), plan(Samples.of(model, [batch]), blocks))
    for segment in stream.plan.segments:
        seen = {b.consumer: [] for b in segment.blocks}
        stream.run(0, inputs=[(path, lambda x, into=into: into.append(x.clone())) for path, into in seen.items()])
        for path, values in seen.items():
            assert len(values) == len(plain[path])
            assert all(torch.equal(x, y) for x, y in zip(values, plain[path], strict=True))
        stream.step()


def test_each_layer_runs_once_and_stops_before_the_consumer_that_it_is_told():
    model = tiny("llama")
    batch = probe_inputs(model)
    blocks = consumers(model, "down_proj")
    stream = Stream(Samples.of(model, [batch]), plan(Samples.of(model, [batch]), blocks))
    ran, hooked = [], []
    for name, module in model.named_modules():
        if name.endswith(("o_proj", "down_proj")):
            run = module.forward
            module.forward = lambda x, name=name, run=run: ran.append(name) or run(x)
    # Those that drop weights that are elsewhere: the forward must not end before them.
    model.model.layers[0].mlp.down_proj.register_forward_hook(lambda *_: hooked.append(len(ran)))
    stream.run(0, stop_at="model.layers.0.mlp.down_proj")
    stream.run(0)
    stream.step()
    stream.run(0)
    assert hooked == [1, 3]
    first = ["model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj"]
    assert ran == [first[0], *first, "model.layers.1.self_attn.o_proj", "model.layers.1.mlp.down_proj"]


@pytest.mark.parametrize("family", [Skips, Grows])
def test_outputs_that_are_read_again_later_are_kept(family):
    model = family().eval()
    found = plan(Samples.of(model, [{"x": torch.randn(2, 4)}]), [block(f"layers.{i}.0") for i in range(3)])
    assert [segment.path for segment in found.segments] == ["layers.0", "layers.1", "layers.2"]
    assert found.retain_all


@pytest.mark.parametrize("read_again", [False, True])
def test_what_only_leads_to_a_finished_segment_is_not_run_again(read_again):
    model, batch = Stem(read_again).eval(), {"x": torch.randn(2, 4)}
    found = plan(Samples.of(model, [batch]), [block("layers.0.0"), block("layers.2.0")])
    assert [segment.path for segment in found.segments] == ["layers.0", "layers.2"]
    # What is added behind all segments is read in no pass, and what the last segment reads is run for it.
    assert found.leads == {"mask": 0, "layers.1": 1} | ({} if read_again else {"stem": 0})
    ran, expected = [], []
    model.stem.register_forward_hook(lambda *_: ran.append("stem"))
    model.layers[2].register_forward_hook(lambda _m, args, _y: expected.append(args[0].clone()))
    call(model, batch)
    ran.clear()
    stream = Stream(Samples.of(model, [batch]), found)
    stream.run(0)
    stream.step()
    for _ in range(2):
        stream.run(0)
        assert torch.equal(expected[-1], expected[0])
    assert len(ran) == 3  # hooks fire, whatever stands in for the module
    calls = []
    model.stem.forward, run = lambda x: calls.append(x) or run(x), model.stem.forward
    stream.run(0)
    assert len(calls) == int(read_again)


def test_leads_of_real_models():
    found = {}
    for family, endings in (("bert", ("output.dense",)), ("whisper", ("fc2",)), ("gemma2", ("down_proj",))):
        model, ran = tiny(family), []
        samples = Samples.of(model, [probe_inputs(model)])
        model.register_forward_pre_hook(lambda *_, ran=ran: ran.append(1))
        parts = plan(samples, consumers(model, *endings))
        assert len(ran) == 3 + len(parts.segments)  # what segments are given again is no lead: none is tried alone
        found[family] = parts.leads
    assert found["bert"] == {"bert.embeddings": 0}
    assert found["gemma2"] == {"model.embed_tokens": 0}
    encoder, decoder = "model.encoder.", "model.decoder."
    layers = found["whisper"][decoder + "embed_tokens"]
    assert found["whisper"] == {
        encoder + "conv1": 0,
        encoder + "conv2": 0,
        encoder + "embed_positions": 0,
        decoder + "embed_tokens": layers,
        decoder + "embed_positions": layers,
    }
    assert layers > 0


def test_a_layer_that_is_called_twice_is_advanced_with_all_around_it():
    model = Reused().eval()
    (segment,) = plan(Samples.of(model, [{"x": torch.randn(2, 4)}]), [block("layers.0")]).segments
    assert segment.path == ""
    assert segment.calls == (2,)
    seen = []
    batch = {"x": torch.ones(2, 4)}
    stream = Stream(Samples.of(model, [batch]), plan(Samples.of(model, [batch]), [block("layers.0")]))
    stream.run(0, inputs=[("layers.0", seen.append)])
    assert len(seen) == 2


def test_blocks_off_the_data_s_path_are_refused():
    model = Skips().eval()
    model.extra = nn.ModuleList([nn.Linear(4, 4)])
    with pytest.raises(ValueError, match=r"first samples of the data, does not reach 'extra\.0': begin the data"):
        plan(Samples.of(model, [{"x": torch.randn(2, 4)}]), [block("layers.0.0"), block("extra.0")])


def test_nothing_stays_on_the_model():
    model = tiny("bert")
    batch = probe_inputs(model)
    before = call(model, batch).logits
    stream = Stream(Samples.of(model, [batch]), plan(Samples.of(model, [batch]), consumers(model, "output.dense")))
    stream.run(0)
    stream.step()
    stream.run(0)
    assert torch.equal(call(model, batch).logits, before)
    assert not any("forward" in module.__dict__ or module._forward_pre_hooks for module in model.modules())
