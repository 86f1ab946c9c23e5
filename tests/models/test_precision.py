import platform
import subprocess
import sys

import psutil
import pytest
import torch
from batches import ready_batches
from runs_of import QUICK, assert_unchanged, snapshot
from tiny import tiny
from torch.overrides import TorchFunctionMode

import hf_subprune.pruning as pruning
from hf_subprune import PruneConfig, prune, prune_checkpoint
from hf_subprune.collection.block_moments import BlockMoments
from hf_subprune.collection.stream import Stream
from hf_subprune.data.reading import prepare
from hf_subprune.models import precision as execution
from hf_subprune.models.precision import as_deployed, fast_products, full_precision, is_slow
from hf_subprune.models.running import evaluating
from hf_subprune.runs.memory import release_memory

OUT_OF_MEMORY = RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.fixture
def room_for(monkeypatch):
    """A device whose memory takes a number of samples."""
    run = Stream.run

    def limit(samples):
        def limited(stream, index, **options):
            if len(stream.batches[index]["input_ids"]) > samples:
                raise OUT_OF_MEMORY
            run(stream, index, **options)

        monkeypatch.setattr(Stream, "run", limited)

    return limit


@pytest.mark.parametrize("variant", ["layer", "seq"])
def test_batches_are_halved_until_they_fit(room_for, variant):
    config = PruneConfig(**QUICK, variant=variant)
    model, other = tiny("llama"), tiny("llama")
    batches = ready_batches(model)
    calibration = prepare(other, batches, config).in_batches_of(1)
    with evaluating(other), pruning.ExitStack() as undo:
        expected = pruning.prune_to(pruning.Calibrated(other, calibration, [config]), config, undo)
        undo.pop_all()
    room_for(1)
    report = prune(model, batches, config)
    assert [b.kept_units for b in report.blocks] == [b.kept_units for b in expected.blocks]
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_no_room_for_one_sample_changes_nothing(room_for):
    model = tiny("llama")
    before = snapshot(model)
    batches = ready_batches(model)
    room_for(0)
    with pytest.raises(RuntimeError, match="No executable batch size"):
        prune(model, batches, PruneConfig(**QUICK))
    assert_unchanged(model, before)


def test_checkpoints_are_pruned_in_batches_that_fit(tmp_path, room_for):
    model = tiny("llama")
    batches = ready_batches(model)
    model.save_pretrained(tmp_path / "model")
    room_for(2)
    report = prune_checkpoint(tmp_path / "model", batches, PruneConfig(**QUICK), tmp_path / "out")
    prune(model, batches, PruneConfig(**QUICK))
    found = type(model).from_pretrained(tmp_path / "out")
    assert found.num_parameters() == model.num_parameters() == report.parameters.after


def test_pieces_of_a_batch_stay_in_its_fold():
    model = tiny("bert")
    whole = prepare(model, ready_batches(model), PruneConfig(**QUICK))
    cut = whole.in_batches_of(3)
    assert max(len(batch["input_ids"]) for batch in (*cut.fit, *cut.held_out)) == 3
    sizes = [len(batch["input_ids"]) for batch in whole.fit]
    assert (cut.fit_samples, cut.held_out_samples) == (sum(sizes), whole.held_out_samples)
    for fold in range(2):
        first, second = (
            torch.cat([b["input_ids"] for b in of.fit[fold : 4 + 4 * (of is cut) : 2]]) for of in (whole, cut)
        )
        assert torch.equal(first, second)


def test_a_block_is_solved_on_the_cpu_where_its_device_has_no_room(monkeypatch):
    expected = prune(tiny("llama"), ready_batches(tiny("llama")), PruneConfig(**QUICK))
    device, to, problem = BlockMoments.device, BlockMoments.to, pruning.Calibrated.problem
    asked, moved = [], []

    def fail_on_device(*args, last):
        asked.append(last)
        if not moved:
            raise OUT_OF_MEMORY
        return problem(*args, last=last)

    def move(moments, where):
        moved.append(where)
        monkeypatch.setattr(BlockMoments, "device", device)
        return to(moments, where)

    monkeypatch.setattr(pruning.Calibrated, "problem", fail_on_device)
    monkeypatch.setattr(BlockMoments, "to", move)
    monkeypatch.setattr(BlockMoments, "device", property(lambda _: torch.device("cuda")))
    report = prune(tiny("llama"), ready_batches(tiny("llama")), PruneConfig(**QUICK))
    assert moved == ["cpu"]
    assert not asked[0] and all(asked[1:])  # the sums must outlast the first try
    assert [b.kept_units for b in report.blocks] == [b.kept_units for b in expected.blocks]


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
    monkeypatch.setattr(execution, "_AT_ONCE", 100)  # a few rows
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


def test_the_probe_is_the_beginning_of_two_samples():
    model = tiny("llama")
    ids = torch.randint(5, 100, (4, 50), generator=torch.Generator().manual_seed(0))
    whole = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for _ in range(6)]
    probe = prepare(model, whole, PruneConfig(**QUICK)).probe
    assert torch.equal(probe["input_ids"], ids[:2, :32])
    padded = [{"input_ids": ids, "attention_mask": torch.arange(50).expand(4, -1).gt(40).long()} for _ in range(6)]
    assert prepare(model, padded, PruneConfig(**QUICK)).probe["input_ids"].shape == (2, 50)


def resident():
    return psutil.Process().memory_info().rss


@pytest.mark.skipif(sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="the C library is another")
def test_what_was_freed_between_pieces_in_use_is_given_back():
    release_memory()
    before = resident()
    pieces = [torch.ones(2**14) for _ in range(2**11)]  # 64 KiB each, on the heap
    in_use = pieces[::2]
    del pieces
    held = resident() - before
    release_memory()
    assert held > 100 * 2**20
    assert resident() - before < 80 * 2**20
    assert len(in_use) == 2**10


HELD = """
import sys
from contextlib import nullcontext

import psutil
import torch

from hf_subprune.models.running import evaluating
from hf_subprune.runs.memory import freed_at_once

with freed_at_once() if sys.argv[1] == "at once" else nullcontext():
    torch.ones(7 * 2**20)  # 28 MiB: from now on the C library would keep pieces of that size
    before = psutil.Process().memory_info().rss
    pieces = [torch.ones(2**18) for _ in range(40)]  # 1 MiB each
    del pieces
    print(psutil.Process().memory_info().rss - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="the C library is another")
@pytest.mark.parametrize("way, least, most", [("at once", 0, 10), ("by and by", 30, 50)])
def test_large_tensors_are_given_back_when_they_are_freed(way, least, most):
    done = subprocess.run([sys.executable, "-c", HELD, way], capture_output=True, text=True, check=True)
    assert least <= int(done.stdout) / 2**20 <= most


@pytest.mark.parametrize("variant", ["layer", "seq"])
def test_memory_is_given_back_after_every_block_or_layer(monkeypatch, variant):
    given_back = []
    monkeypatch.setattr(pruning, "release_memory", lambda: given_back.append(1))
    model = tiny("llama")
    report = prune(model, ready_batches(model), PruneConfig(**QUICK | {"variant": variant}))
    shrunk = sum(block.units_after < block.units_before for block in report.blocks)
    assert shrunk == 2 * model.config.num_hidden_layers
    # In a layer whose blocks read one another forwards come between, which would take the memory again.
    assert len(given_back) == (shrunk if variant == "layer" else model.config.num_hidden_layers)
