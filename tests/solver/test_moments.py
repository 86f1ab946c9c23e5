"""Streamed moments against float64 products of all rows at once."""

import pytest
import torch
from torch.overrides import TorchFunctionMode

from hf_subprune.solver.moments import MomentAccumulator, combine


def rows(count=200, n=12, m=4, offset=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    B = torch.randn(count, n, generator=generator, dtype=torch.float64) + offset
    A = B + 0.1 * torch.randn(count, n, generator=generator, dtype=torch.float64)
    return B, A, torch.randn(n, m, generator=generator, dtype=torch.float64)


def truth(B, Y, intercept):
    """H, C, t of all rows, in float64."""
    if intercept:
        B, Y = B - B.mean(0), Y - Y.mean(0)
    return B.T @ B, B.T @ Y, float(Y.square().sum())


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("targets", [True, False])
@pytest.mark.parametrize("batch", [1, 7, 200])
def test_streamed_moments_are_those_of_all_rows(intercept, targets, batch):
    B, A, W = rows(offset=2.0)
    Y = A @ W if targets else B @ W
    accumulator = MomentAccumulator(12, 4 if targets else None, intercept=intercept)
    for start in range(0, 200, batch):
        part = slice(start, start + batch)
        accumulator.update(B[part], Y[part] if targets else None)
    moments = accumulator.moments(W)
    H, C, t = truth(B, Y, intercept)
    torch.testing.assert_close(moments.H, H)
    torch.testing.assert_close(moments.C, C)
    assert moments.t == pytest.approx(t)
    assert moments.rows == 200
    torch.testing.assert_close(moments.input_mean, B.mean(0))
    torch.testing.assert_close(moments.target_mean, Y.mean(0))
    assert torch.equal(moments.H, moments.H.T)


@pytest.mark.parametrize("sums", [torch.float64, torch.float32])
@pytest.mark.parametrize("inputs", [torch.float32, torch.bfloat16])
def test_batch_products_in_float32_hold_six_digits(inputs, sums):
    B = rows(6400, n=40)[0].to(inputs)
    W = rows(1, n=40)[2]
    accumulator = MomentAccumulator(40, intercept=True, dtype=sums)
    for part in B.split(64):
        accumulator.update(part)
    H, C, t = truth(B.double(), B.double() @ W, True)
    moments = accumulator.moments(W)
    assert float((moments.H.double() - H).abs().max() / H.diagonal().max()) < 2e-6
    assert float((moments.C.double() - C).abs().max() / C.abs().max()) < 1e-5
    assert moments.t == pytest.approx(t, rel=1e-5)


def test_sums_of_many_products_in_float32_hold_six_digits():
    # Of one sign, so that what is added gets ever smaller beside the sum.
    B = rows(400 * 1024, n=6)[0].float().abs()
    accumulator = MomentAccumulator(6, intercept=False, dtype=torch.float32)
    for part in B.split(1024):
        accumulator.update(part)
    found = accumulator.moments(torch.ones(6, 1)).H
    assert found.dtype == torch.float32
    expected = B.double().T @ B.double()
    assert float((found - expected).abs().max() / expected.diagonal().max()) < 2e-6


def test_centring_cancels_no_digits_of_a_large_mean():
    B, _, W = rows(2000, offset=1e4)
    accumulator = MomentAccumulator(12, intercept=True)
    for part in B.float().split(100):
        accumulator.update(part)
    H, _, _ = truth(B.float().double(), B @ W, True)
    assert float((accumulator.moments(W).H - H).abs().max() / H.diagonal().max()) < 1e-5


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("targets", [True, False])
def test_combined_parts_are_the_moments_of_all_rows(intercept, targets):
    B, A, W = rows(offset=1.0)
    Y = A @ W if targets else B @ W
    parts = []
    for part in (slice(0, 50), slice(50, 130), slice(130, 200)):
        accumulator = MomentAccumulator(12, 4 if targets else None, intercept=intercept)
        accumulator.update(B[part], Y[part] if targets else None)
        parts.append(accumulator)
    H, C, t = truth(B, Y, intercept)
    moments = combine([part.moments(W) for part in parts])
    torch.testing.assert_close(moments.H, H)
    torch.testing.assert_close(moments.C, C)
    assert moments.t == pytest.approx(t)
    assert moments.rows == 200
    torch.testing.assert_close(moments.input_mean, B.mean(0))
    torch.testing.assert_close(moments.target_mean, Y.mean(0))


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("targets", [True, False])
@pytest.mark.parametrize("scale", [1, 1000])
def test_a_row_of_twice_the_weight_counts_as_two_rows(intercept, targets, scale):
    B, A, W = rows(count=40, offset=2.0)
    Y, times = A @ W if targets else None, torch.arange(40) % 4
    weighed, repeated = (MomentAccumulator(12, 4 if targets else None, intercept=intercept) for _ in range(2))
    for part in (slice(0, 7), slice(7, 40)):
        weighed.update(B[part], None if Y is None else Y[part], scale * times[part])
    repeated.update(B.repeat_interleave(times, 0), None if Y is None else Y.repeat_interleave(times, 0))
    weighed.recentre(torch.ones(12, dtype=torch.float64))
    found, expected = weighed.moments(W), repeated.moments(W)
    each = 40 / 60  # there are as many rows as came, and each counts once on average
    assert found.rows == 40
    torch.testing.assert_close(found.H, each * expected.H)
    torch.testing.assert_close(found.C, each * expected.C)
    assert found.t == pytest.approx(each * expected.t)
    torch.testing.assert_close(found.input_mean, expected.input_mean)
    torch.testing.assert_close(found.target_mean, expected.target_mean)


def test_rows_of_equal_weight_count_as_those_without():
    B, _, W = rows()
    plain, weighed = (MomentAccumulator(12, intercept=True) for _ in range(2))
    plain.update(B)
    weighed.update(B, None, torch.full((200,), 0.25))
    torch.testing.assert_close(weighed.moments(W).H, plain.moments(W).H)


def test_rows_that_all_weigh_nothing_have_no_moments():
    accumulator = MomentAccumulator(12, intercept=False)
    accumulator.update(rows(count=5)[0], None, torch.zeros(5))
    with pytest.raises(ValueError, match="All rows weigh nothing"):
        accumulator.moments(rows()[2])


def test_misuse_is_refused():
    B, _, W = rows()
    accumulator = MomentAccumulator(12, intercept=True)
    with pytest.raises(ValueError, match="No row"):
        accumulator.moments(W)
    with pytest.raises(ValueError, match="12 inputs"):
        accumulator.update(B[:, :5])
    with pytest.raises(ValueError, match="Targets"):
        accumulator.update(B, B)
    accumulator.update(B)
    with pytest.raises(ValueError, match="weight is needed"):
        accumulator.moments()
    with pytest.raises(ValueError, match="no moments"):
        combine([])
    raw = MomentAccumulator(12, intercept=False)
    raw.update(B)
    with pytest.raises(ValueError, match="Centred and raw"):
        combine([raw.moments(W), accumulator.moments(W)])


class Full(TorchFunctionMode):
    """A device on which the first square matrix of zeros finds no room."""

    failures = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.zeros and args == (6, 6) and not self.failures:
            self.failures += 1
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return func(*args, **(kwargs or {}))


def test_rows_that_find_no_room_for_their_sums_are_added_up_on_the_cpu():
    rows, targets = torch.randn(40, 6), torch.randn(40, 3)
    expected = MomentAccumulator(6, 3, intercept=True)
    kept = MomentAccumulator(6, 3, intercept=True, keep_rows=True)
    for accumulator in (expected, kept):
        accumulator.update(rows[:8], targets[:8])
    assert kept.kept_rows is not None
    with Full() as full:
        for accumulator in (expected, kept):
            accumulator.update(rows[8:], targets[8:])
    assert kept.kept_rows is None and full.failures == 1
    one, other = (accumulator.moments(last=True) for accumulator in (expected, kept))
    assert torch.allclose(one.H, other.H) and torch.allclose(one.C, other.C) and one.rows == other.rows == 40


@pytest.mark.parametrize("keep_rows", [True, False])
def test_a_copy_on_a_device_holds_the_same_and_goes_its_own_way(keep_rows):
    B, A, W = rows(count=10)
    accumulator = MomentAccumulator(12, 4, intercept=True, keep_rows=keep_rows)
    accumulator.update(B, A @ W)
    copied = accumulator.to("cpu")
    assert (copied.kept_rows is not None) == keep_rows
    expected = copied.moments()
    accumulator.update(B + 1, A @ W)
    assert torch.equal(copied.moments().H, expected.H) and copied.rows == 10
    H, C, _ = truth(torch.cat([B, B + 1]), torch.cat([A @ W, A @ W]), True)
    torch.testing.assert_close(accumulator.moments().H, H)
    torch.testing.assert_close(accumulator.moments().C, C)


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("targets", [True, False])
def test_the_last_moments_are_the_same_in_the_memory_of_the_sums(intercept, targets):
    B, A, W = rows(offset=2.0)
    accumulator = MomentAccumulator(12, 4 if targets else None, intercept=intercept)
    accumulator.update(B, A @ W if targets else None)
    first = accumulator.moments(W)
    gram = accumulator.sums()[0]
    last = accumulator.moments(W, last=True)
    assert last.H.data_ptr() == gram.data_ptr() != first.H.data_ptr()
    assert torch.equal(last.H, first.H) and torch.equal(last.C, first.C) and last.t == first.t
    with pytest.raises(AttributeError):
        accumulator.moments(W)
