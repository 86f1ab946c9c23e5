"""The fault bench: kills, interrupts, damage and memory that runs out, at instants drawn at random.

What must hold: the same files or weights as without the fault, or an error that says what to do and a model that is
exactly as it was. Every injection counts as fired only once it has happened, and a kind that never fired fails. The
seed of each test is printed; `FAULT_SEED` sets another.
"""

import os
import random
import re
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from batches import ready_batches
from forked import SERVERS
from runs_of import assert_unchanged, files, snapshot
from tiny import tiny
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import MixtralConfig, MixtralForCausalLM

import hf_subprune
from hf_subprune import PruneConfig, prune, prune_checkpoint

QUICK = {"samples": 8, "held_out": 4, "batch_size": 4}
CONFIG = PruneConfig(**QUICK, keep=0.5)
PACKAGE = Path(hf_subprune.__file__).parent

pytestmark = [pytest.mark.usefixtures("without_plots"), pytest.mark.slow]


@pytest.fixture
def instants():
    """Where faults are injected, in the order in which they are drawn."""
    seed = int(os.environ.get("FAULT_SEED", random.randrange(10**6)))
    print(f"FAULT_SEED={seed}")
    return random.Random(seed)


@pytest.fixture
def checkpoint(tmp_path):
    """A small checkpoint in several files, and batches for it."""
    model = tiny("llama", num_hidden_layers=2)
    model.save_pretrained(tmp_path / "model", max_shard_size="60KB")
    return tmp_path / "model", ready_batches(model)


KILLS = 8
RUN = """
import sys
from batches import ready_batches
from tiny import tiny
from hf_subprune import PruneConfig, prune_checkpoint
from hf_subprune.report import page
page.find_spec = lambda _: None
batches = ready_batches(tiny("llama", num_hidden_layers=2))
config = PruneConfig(samples=8, held_out=4, batch_size=4, variant="asym", layout="ragged")
prune_checkpoint(sys.argv[1], batches, config, sys.argv[2])
"""


def test_kills_lose_nothing(tmp_path, checkpoint, instants):
    """Runs that are killed, each at a random instant, until one ends."""
    script, out = tmp_path / "run.py", tmp_path / "b"
    script.write_text(RUN)
    fired = Counter()
    server = SERVERS["hf_subprune"]
    start = time.monotonic()
    assert server.run(script, checkpoint[0], tmp_path / "a") == [0]
    whole = time.monotonic() - start
    for _ in range(12 * KILLS):
        if fired["kill"] == KILLS:
            break
        fresh, start = not (tmp_path / ".b.partial").exists(), time.monotonic()
        (code,) = server.run(script, checkpoint[0], out, seconds=instants.uniform(0, whole))
        assert code in (0, -signal.SIGKILL)
        fired["kill"] += code != 0
        if code == 0:
            if fresh:  # the first run may have been slowed down by whatever else the machine did
                whole = min(whole, time.monotonic() - start)
            assert files(out) == files(tmp_path / "a")
            shutil.rmtree(out)
    assert server.run(script, checkpoint[0], out) == [0]
    assert files(out) == files(tmp_path / "a")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "model", "run.py"]
    print(f"injected: {dict(fired)}")
    assert fired["kill"] == KILLS


INTERRUPTS = 8
SURGERY = ("surgery/", "models/experts.py", "models/forms.py", "models/multihead.py", "models/listed.py")


def traced(act, run):
    """Run something, with `act(place)` before every line of what changes a model."""

    def line(frame, event, _):
        if event == "line":
            act(frame.f_code.co_filename)
        return line

    def call(frame, *_):
        where = frame.f_code.co_filename
        return line if where.startswith(str(PACKAGE)) and any(part in where for part in SURGERY) else None

    sys.settrace(call)
    try:
        return run()
    finally:
        sys.settrace(None)


def mixture():
    """One layer of experts that are stacked in one tensor."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
    text = {"vocab_size": 120, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "num_hidden_layers": 1}
    return MixtralForCausalLM(MixtralConfig(**sizes, **text, num_local_experts=4, num_experts_per_tok=2))


@pytest.mark.parametrize("family", ["bert", "mixtral"])
def test_interrupts_leave_the_model_as_it_was(family, instants):
    def model_of_one_layer():
        return (mixture() if family == "mixtral" else tiny(family, num_hidden_layers=1)).train()

    batches = ready_batches(model_of_one_layer())
    lines = Counter()
    whole = model_of_one_layer()
    traced(lambda where: lines.update([where]), lambda: prune(whole, batches, CONFIG))
    fired = Counter()
    for at in sorted(instants.sample(range(lines.total()), INTERRUPTS)):
        model, passed = model_of_one_layer(), Counter()
        before = snapshot(model)

        def stop(where, at=at, passed=passed):
            passed.update([where])
            if passed.total() == at + 1:
                sys.settrace(None)
                fired["surgery" if "surgery" in where else "attachment"] += 1
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            traced(stop, lambda model=model: prune(model, batches, CONFIG))
        assert_unchanged(model, before)
    print(f"injected into {family}: {dict(fired)}")
    assert fired.total() == INTERRUPTS and fired["surgery"]
    assert fired["attachment"] or family == "bert"


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def empty(path):
    os.truncate(path, 0)


DAMAGE = {"cut": cut, "flip": flip, "empty": empty, "remove": os.remove}


class StoppedError(Exception):
    pass


def kind_of(path):
    """Files of a kind are read by the same lines."""
    return re.sub(r"\d+", "n", path.parent.name) + "/" + re.sub(r"\d+", "n", path.name)


def test_damage_is_named_or_does_not_matter(tmp_path, checkpoint, computed, instants):
    """Every kind of file that a stopped run has left, and of the checkpoint, damaged in one of the ways."""
    source, batches = checkpoint
    config = PruneConfig(**QUICK, variant="asym", layout="ragged")
    prune_checkpoint(source, batches, config, tmp_path / "a")
    computed.start_anew()
    computed.stop_at_block(1, StoppedError())
    with pytest.raises(StoppedError) as stopped:  # its frames keep the files that a killed process would leave, too
        prune_checkpoint(source, batches, config, tmp_path / "stopped" / "out")
    computed.start_anew()
    left = [path for path in sorted((tmp_path / "stopped").rglob("*")) if path.is_file()]
    kinds = {kind_of(path): path.relative_to(tmp_path) for path in (*left, *source.iterdir())}
    assert "new/n.safetensors" in kinds, stopped
    shutil.copytree(source, tmp_path / "kept")
    fired, ways = Counter(), list(DAMAGE)
    for number, (kind, path) in enumerate(sorted(kinds.items())):
        way = ways[number % len(ways)] if number < len(ways) else instants.choice(ways)
        shutil.copytree(tmp_path / "stopped", tmp_path / "try")
        in_try = Path("try", *path.parts[1:]) if path.parts[0] == "stopped" else path
        DAMAGE[way](tmp_path / in_try)
        fired[way] += 1
        try:
            prune_checkpoint(source, batches, config, tmp_path / "try" / "out")
        except (ValueError, OSError) as error:
            assert path.name in str(error) or path.stem in str(error), (kind, way)
            assert re.search("[Rr]emove|[Pp]ut|[Ss]tart", str(error)), (kind, way)
        else:
            assert files(tmp_path / "try" / "out") == files(tmp_path / "a"), (kind, way)
        shutil.rmtree(tmp_path / "try")
        shutil.rmtree(source)
        shutil.copytree(tmp_path / "kept", source)
    print(f"injected: {dict(fired)}, in {len(kinds)} kinds of files")
    assert set(fired) == set(DAMAGE) and len(kinds) >= 10


SHORTAGES = 8


class OutOfMemory(TorchDispatchMode):
    """Counts operations, and raises at one of them as an allocator does."""

    def __init__(self, at=None):
        super().__init__()
        self.at, self.passed, self.fired = at, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.passed += 1
        if self.passed == self.at:
            self.fired += 1
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 TB")
        return function(*args, **(kwargs or {}))


def test_memory_that_runs_out_is_no_reason_to_leave_a_block_whole(instants):
    batches = ready_batches(tiny("bert", num_hidden_layers=1))
    with OutOfMemory() as counted:
        expected = prune(tiny("bert", num_hidden_layers=1), batches, CONFIG)
    fired = Counter()
    for at in instants.sample(range(1, counted.passed), SHORTAGES):
        model = tiny("bert", num_hidden_layers=1)
        before = snapshot(model)
        with OutOfMemory(at) as mode:
            try:
                report = prune(model, batches, CONFIG)
            except (RuntimeError, ValueError) as error:
                assert "memory" in str(error)
                assert_unchanged(model, before)
                fired["raised"] += 1
            else:
                assert report.refusals == expected.refusals
                assert [b.name for b in report.blocks] == [b.name for b in expected.blocks]
                fired["halved"] += 1
        assert mode.fired
    print(f"injected: {dict(fired)}")
    assert fired.total() == SHORTAGES and fired["halved"]
