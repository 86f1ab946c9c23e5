import pytest
import torch
from batches import ready_batches
from runs_of import QUICK
from tiny import tiny
from torch.overrides import TorchFunctionMode

from hf_subprune import PruneConfig, prune
from hf_subprune.models import precision
from hf_subprune.models.precision import as_deployed, fast_products, full_precision, is_slow


def test_products_are_in_full_precision_for_the_time_being():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with full_precision():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.fixture
def slow_halves(monkeypatch):
    """A CPU without instructions for half precision; the dtypes of what linears multiply on it."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "x86_64"}, raising=False)
    multiplied = []

    class Spy(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is torch.nn.functional.linear:
                multiplied.append(args[0].dtype)
            return func(*args, **(kwargs or {}))

    with Spy():
        yield multiplied


def test_linears_of_half_precision_run_in_float32_where_those_are_faster(slow_halves, monkeypatch):
    model = tiny("bert").to(torch.bfloat16)
    batch = ready_batches(model)[0]
    native = model(**batch)[0]
    slow_halves.clear()
    monkeypatch.setattr(precision, "_AT_ONCE", 100)  # a few rows
    with fast_products(model.parameters()):
        fast = model(**batch)[0]
        assert set(slow_halves) == {torch.float32}
        slow_halves.clear()
        with as_deployed():
            assert torch.equal(model(**batch)[0], native)
        assert set(slow_halves) == {torch.bfloat16}
    assert fast.dtype == torch.bfloat16
    torch.testing.assert_close(fast, native, rtol=0.03, atol=0.03)


@pytest.mark.parametrize(
    ("dtype", "capabilities", "slow"),
    [
        (torch.bfloat16, {"architecture": "x86_64", "avx512_bf16": False}, True),
        (torch.bfloat16, {"architecture": "x86_64", "amx_bf16": True}, False),
        (torch.float16, {"architecture": "x86_64", "avx512_bf16": True}, True),
        (torch.float32, {"architecture": "x86_64"}, False),
        (torch.bfloat16, {"architecture": "aarch64"}, False),
    ],
)
def test_which_products_are_slow_depends_on_the_processor(dtype, capabilities, slow, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert is_slow(dtype) == slow


def test_a_model_of_half_precision_is_pruned_with_products_in_float32(slow_halves):
    model = tiny("llama").to(torch.bfloat16)
    report = prune(model, ready_batches(model), PruneConfig(**QUICK))
    assert torch.float32 in slow_halves and torch.bfloat16 in slow_halves  # calibration, latency
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert report.parameters.after < report.parameters.before
