"""How far a reader follows the model, and a block's moments on their way to new weights, through `prune`.

Prints, of a run on a tiny BERT, the modules of the package with a frame that receives the model, and the calls between
the frame that is given the moments of a block and the one that makes its new weights. `python tests/spine.py`
"""

import inspect
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
from transformers import BertConfig, BertModel

from hf_subprune import PruneConfig, prune
from hf_subprune.collection.walk import SequentialWalk, Walk
from hf_subprune.solver.reweighting import reweight

HAND_OUT = {kind.moments.__code__ for kind in (Walk, SequentialWalk)}
"""Methods that return a block's moments."""


class Spine:
    """Watches the calls of a run.

    Attributes:
        rooms: By module, the functions that receive the model.
        chain: The calls from the one that is given moments to the one that makes weights, as `module.function`.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.rooms: dict[str, set[str]] = {}
        self.chain: list[str] = []
        self._holder: Any = None

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        module = frame.f_globals.get("__name__", "")
        if not module.startswith("hf_subprune"):
            return
        if event == "call" and any(value is self.model for value in _arguments(frame)):
            self.rooms.setdefault(module, set()).add(frame.f_code.co_name)
        if event == "return" and frame.f_code in HAND_OUT and frame.f_back is not None:
            self._holder = frame.f_back.f_code
        if event == "call" and frame.f_code is reweight.__code__ and not self.chain:
            calls = [f"{one.f_globals['__name__']}.{one.f_code.co_name}" for one in self._above(frame)]
            self.chain = calls[::-1]

    def _above(self, frame: FrameType | None) -> Iterator[FrameType]:
        """The frames of the package from one up to, and without, the one that was given the moments."""
        while frame is not None and frame.f_code is not self._holder:
            if frame.f_globals.get("__name__", "").startswith("hf_subprune"):
                yield frame
            frame = frame.f_back


def _arguments(frame: FrameType) -> list[Any]:
    """What a function was called with."""
    names = inspect.getargs(frame.f_code)
    return [frame.f_locals.get(name) for name in (*names.args, names.varargs, names.varkw) if name]


def follow() -> Spine:
    """The spine of `prune` with its default config."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    model = BertModel(BertConfig(vocab_size=100, **sizes))
    batches = [{"input_ids": torch.randint(100, (4, 12))} for _ in range(6)]
    spine = Spine(model)
    sys.setprofile(spine)
    try:
        prune(model, batches, PruneConfig(samples=16, held_out=8))
    finally:
        sys.setprofile(None)
    return spine


if __name__ == "__main__":
    found = follow()
    for room, functions in sorted(found.rooms.items()):
        print(f"{room}: {', '.join(sorted(functions))}")
    print(f"{len(found.rooms)} modules receive the model.")
    print("Moments to weights: " + " -> ".join(call.removeprefix("hf_subprune.") for call in found.chain))
    print(f"{len(found.chain)} calls between moments and new weights.")
