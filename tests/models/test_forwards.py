import copy
import functools
import inspect
import io

import pytest
import torch
from torch import nn

from hf_subprune.blocks import Argument, Attribute, Block, Slice
from hf_subprune.models.forwards import INNER_WIDTH, reading_inner_width
from hf_subprune.storage.spec import LayoutSpec, adaptations, apply_spec
from hf_subprune.surgery.edits import shrink


class Widths(nn.Module):
    """Two heads of three features; the forward takes their width together for that of its input."""

    def __init__(self):
        super().__init__()
        self.num_heads = 2
        self.up, self.down = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x, bias=None):
        batch, length, width = x.size()
        assert list(x.size()) == [batch, length, width]
        heads = self.up(x).view(batch, length, self.num_heads, width // self.num_heads)
        if bias is not None:
            heads = heads + bias
        return self.down(heads.reshape(batch, length, width))


def renamed(old: str, new: str):
    """A decorator like those of Transformers that rename an argument."""

    def decorator(function):
        @functools.wraps(function)
        def wrapper(*args, **kwargs):
            if old in kwargs:
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return wrapper

    return decorator


class Opaque:
    """A decorator that keeps what it wraps in no variable of a function."""

    def __init__(self, function):
        functools.update_wrapper(self, function)

    def __get__(self, instance, owner=None):
        return self if instance is None else functools.partial(self.__wrapped__, instance)

    def __call__(self, *args, **kwargs):
        return self.__wrapped__(*args, **kwargs)


class Decorated(Widths):
    forward = torch.no_grad()(renamed("mask", "bias")(Widths.forward))


def block(*attributes: Attribute, arguments: tuple = ()) -> Block:
    index = torch.arange(6).view(2, 3)
    slices = (Slice("down.weight", 1, index), Slice("up.weight", 0, index), Slice("up.bias", 0, index))
    counts = (Attribute("", "num_heads", 2, 1), *attributes)
    return Block("heads", "attention", "down", index, slices, counts, 1, arguments=arguments)


INNER = Attribute("", INNER_WIDTH, 6, 3)
BIAS = Argument("", "bias", 2, 2, torch.arange(2).view(2, 1))


def masked(model: Widths, x: torch.Tensor, **kwargs) -> torch.Tensor:
    """What the model computes without its first head."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.down.weight[:, :3] = 0
    return model(x, **kwargs)


def test_a_forward_follows_an_inner_width_and_comes_back():
    model, x = Widths(), torch.randn(2, 4, 6)
    before, expected = model(x), masked(model, x)
    edit = shrink(model, block(INNER), [1])
    assert torch.allclose(model(x), expected, atol=1e-6)
    assert torch.allclose(copy.deepcopy(model)(x), expected, atol=1e-6)
    edit.undo()
    assert torch.equal(model(x), before) and "forward" not in vars(model) and INNER_WIDTH not in vars(model)
    edit.redo()
    assert torch.allclose(model(x), expected, atol=1e-6)


def test_what_is_saved_whole_keeps_what_was_adapted():
    model, x, bias = Widths(), torch.randn(2, 4, 6), torch.randn(2, 4, 2, 1)
    shrink(model, block(INNER, arguments=(BIAS,)), [1])
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(loaded(x, bias), model(x, bias))
    assert loaded.forward.module is loaded and copy.deepcopy(model).forward.module is not model
    assert list(inspect.signature(loaded.forward).parameters) == ["x", "bias"]


def test_arguments_are_cut_by_name_and_by_position_and_may_be_none():
    model, x, bias = Widths(), torch.randn(2, 4, 6), torch.randn(2, 4, 2, 1)
    expected, without = masked(model, x, bias=bias), masked(model, x)
    shrink(model, block(INNER, arguments=(BIAS,)), [1])
    assert torch.allclose(model(x, bias=bias), expected, atol=1e-6)
    assert torch.allclose(model(x, bias), expected, atol=1e-6)
    assert torch.allclose(model(x), without, atol=1e-6)


def test_an_argument_is_cut_again_among_what_was_left():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x, scale):
            return self.down(self.up(x) * scale)

    def neurons(count: int) -> Block:
        index = torch.arange(count).unsqueeze(1)
        slices = (Slice("down.weight", 1, index), Slice("up.weight", 0, index), Slice("up.bias", 0, index))
        cut = (Argument("", "scale", 1, 6, index),)
        return Block("neurons", "mlp", "down", index, slices, (), 1, arguments=cut)

    model, x, scale = Scaled(), torch.randn(4, 6), torch.randn(4, 6)
    zeroed = copy.deepcopy(model)
    with torch.no_grad():
        zeroed.down.weight[:, [0, 1, 3]] = 0
    first = shrink(model, neurons(6), [1, 2, 4, 5])
    second = shrink(model, neurons(4), [1, 2, 3])
    third = shrink(model, neurons(3), [0, 1, 2])
    assert model.kept_scale.tolist() == [2, 4, 5]
    assert torch.allclose(model(x, scale), zeroed(x, scale), atol=1e-6)
    for edit in (third, second, first):
        edit.undo()
    assert not dict(model.named_buffers()) and "forward" not in vars(model)


def test_a_spec_adapts_a_model_built_anew():
    pruned, x, bias = Widths(), torch.randn(2, 4, 6), torch.randn(2, 4, 2, 1)
    shrink(pruned, block(INNER, arguments=(BIAS,)), [1])
    attributes, arguments, _ = adaptations(pruned)
    assert attributes == {INNER_WIDTH: 3} and arguments == {"bias": (2, 2, 1)}
    spec = LayoutSpec(
        {"up.weight": (3, 6), "up.bias": (3,), "down.weight": (6, 3)},
        {"": {**attributes, "num_heads": 1}},
        {"": arguments},
    )
    assert LayoutSpec.from_dict(spec.to_dict()) == spec
    rebuilt = Widths()
    assert apply_spec(rebuilt, spec) == apply_spec(rebuilt, spec) == spec
    rebuilt.load_state_dict(pruned.state_dict())
    torch.testing.assert_close(rebuilt(x, bias), pruned(x, bias))


def test_a_spec_of_a_forward_that_takes_no_shape_apart_is_refused():
    with pytest.raises(ValueError, match="takes no shape apart: load with the version of transformers"):
        apply_spec(nn.Sequential(nn.Linear(2, 2)), LayoutSpec({}, {"0": {INNER_WIDTH: 1}}))


def test_forwards_that_cannot_be_rewritten_are_left():
    assert reading_inner_width(nn.Linear.forward) is None
    assert reading_inner_width(Opaque(Widths.forward)) is None
    assert reading_inner_width(torch.no_grad()(Opaque(Widths.forward))) is None
    rewritten = reading_inner_width(Widths.forward)
    assert rewritten is reading_inner_width(Widths.forward)
    assert rewritten.__code__.co_filename == __file__
    assert rewritten.__code__.co_firstlineno == Widths.forward.__code__.co_firstlineno


def test_a_forward_keeps_its_decorators():
    model, x, bias = Decorated(), torch.randn(2, 4, 6), torch.randn(2, 4, 2, 1)
    expected, whole = masked(model, x, bias=bias), model(x, mask=bias)
    edit = shrink(model, block(INNER, arguments=(BIAS,)), [1])
    for found in (model(x, bias=bias), copy.deepcopy(model)(x, bias)):
        assert torch.allclose(found, expected, atol=1e-6) and not found.requires_grad
    edit.undo()
    assert torch.equal(model(x, mask=bias), whole)
    edit = shrink(model, block(INNER), [1])
    assert torch.allclose(model(x, mask=bias[:, :, 1:]), expected, atol=1e-6)
    assert list(inspect.signature(model.forward).parameters) == ["x", "bias"]


def test_a_size_that_is_taken_by_itself_is_read_as_well():
    class Taken(Widths):
        def forward(self, x):
            heads = self.up(x).view(*x.shape[:2], self.num_heads, x.shape[-1] // self.num_heads)
            return self.down(heads.reshape(*x.shape[:2], x.shape[-1]))

    model, x = Taken(), torch.randn(2, 4, 6)
    expected = masked(model, x)
    shrink(model, block(INNER), [1])
    assert torch.allclose(model(x), expected, atol=1e-6)
