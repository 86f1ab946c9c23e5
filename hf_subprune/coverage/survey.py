"""What becomes of every architecture of the installed Transformers: pruned exactly, or refused and why."""

from __future__ import annotations

import copy
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from ..blocks import Block, Discovery, groups_of
from ..discovery.discover import discover
from ..discovery.probe_inputs import probe_inputs
from ..models.forms import apart
from ..models.running import floating_tensors, undisturbed
from ..storage.layout import choose_layout
from ..surgery.edits import shrink
from .architectures import model_types
from .isolation import isolated
from .tiny import NO_CLASS, CannotBuildError, first_line, tiny_model

TOLERANCE = 1e-4
"""Largest difference between a shrunk and a masked model, as a fraction of an output's largest value."""
KINDS = ("mlp", "attention", "channels")
UNPRUNED = "as unpruned: "
"""In front of what becomes of a reloaded model that does not reload exactly unpruned either."""
LIKELY = {"mlp": re.compile("MLP|FeedForward|FFN|Intermediate|Expert"), "attention": re.compile("Attention|Attn")}
"""Class names of modules in which one would expect blocks of a kind; used only to count what is missed."""


@dataclass(frozen=True)
class KindOutcome:
    """What became of the blocks of one kind in one model.

    Args:
        verdict: `"exact"`: all were found and shrink exactly; `"partly"`: those found do, others were refused;
            `"refused"`: none was found, some were refused; `"missed"`: the model has modules with the name of this
            kind in which nothing was found or refused; `"absent"`: it has none; `"wrong"`: a block that discovery
            returned does not shrink exactly. What is never pruned (refusals of kind `"whole"`) does not count.
        found: Number of blocks.
        refused: Names of what was refused, with the reasons.
        difference: Largest relative difference between the shrunk and the masked model, over the found blocks; with
            query heads removed in place of whole key/value heads as well, where blocks offer both.
    """

    verdict: str
    found: int = 0
    refused: dict[str, str] = field(default_factory=dict)
    difference: float | None = None


@dataclass(frozen=True)
class Row:
    """One model type with one head.

    Args:
        model_type: Key of `transformers.CONFIG_MAPPING`.
        head: `"base"` or `"main"`.
        architecture: Class of the model; empty if there is none.
        problem: Why the model could not be built or run, or where the survey failed; empty if nothing did.
        inputs: Names of the inputs that the forward ran with.
        kinds: Outcome per kind of block; empty if there is a `problem` with the model.
        layout: How the shrunk model was stored: `"stock"`, `"ragged"`, or why it could not be.
        reload: `"exact"` if the reloaded model gives the same outputs, else what happened (behind `UNPRUNED` what
            happens to the unpruned model, where it does not reload either); empty if nothing was saved.
        seconds: Time that all of it took.
    """

    model_type: str
    head: str
    architecture: str = ""
    problem: str = ""
    inputs: tuple[str, ...] = ()
    kinds: dict[str, KindOutcome] = field(default_factory=dict)
    layout: str = ""
    reload: str = ""
    seconds: float = 0.0

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Row:
        """The reverse of `dataclasses.asdict`, also after JSON."""
        kinds = {kind: KindOutcome(**outcome) for kind, outcome in values["kinds"].items()}
        return cls(**{**values, "kinds": kinds, "inputs": tuple(values["inputs"])})

    @property
    def silently_wrong(self) -> bool:
        """Whether a user would get a wrong model without an error."""
        return any(outcome.verdict == "wrong" for outcome in self.kinds.values()) or self.reload.startswith("differs")


def survey(
    model_types: Sequence[str] | None = None,
    heads: Sequence[str] = ("base", "main"),
    *,
    seconds: float = 120.0,
    workers: int = 2,
    done: Sequence[Row] = (),
    progress: Callable[[Row], None] | None = None,
    run: Callable[..., Iterable[Row]] = isolated,
) -> list[Row]:
    """Discover, shrink by half, verify, save, reload and compare a tiny model of every type.

    Each model is handled in a process of its own: one that crashes or hangs costs its row only.

    Args:
        model_types: Types to look at; all of the installed Transformers by default.
        heads: `"base"`, `"main"` or both.
        seconds: Time for one model; more counts as a problem.
        workers: Processes at a time.
        done: Rows of an earlier survey that was interrupted: they are taken as they are.
        progress: Called with each new row, in order, as soon as it is there.
        run: Calls a function on each item, as `isolation.isolated` does.

    Returns:
        One row per type and head that exists, in the order asked for.
    """
    wanted = [(model_type, head) for model_type in architectures_of(model_types) for head in heads]
    rows = {(row.model_type, row.head): row for row in done}
    items = [item for item in wanted if item not in rows]
    for row in run(examine_item, items, _lost, seconds=seconds, workers=workers):
        if row.head == "main" and f"{NO_CLASS} main class" in row.problem:
            continue
        rows[row.model_type, row.head] = row
        if progress is not None:
            progress(row)
    return [rows[item] for item in wanted if item in rows]


def architectures_of(names: Sequence[str] | None) -> list[str]:
    """The model types asked for, all by default.

    Raises:
        ValueError: Transformers has no such type.
    """
    known = model_types()
    unknown = sorted(set(names or ()) - set(known))
    if unknown:
        raise ValueError(f"Transformers {transformers.__version__} has no model type {', '.join(map(repr, unknown))}")
    return list(known if names is None else names)


def _lost(item: tuple[str, str], reason: str) -> Row:
    return Row(*item, problem=reason)


def examine_item(item: tuple[str, str]) -> Row:
    """`examine` in a process of its own, on one thread and without warnings."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    return examine(*item)


def examine(model_type: str, head: str) -> Row:
    """The row of one model; no error but a crash of the process escapes."""
    start = time.perf_counter()
    row: dict[str, Any] = {"model_type": model_type, "head": head}
    try:
        model = tiny_model(model_type, head)
        row["architecture"] = type(model).__name__
        inputs = probe_inputs(model)
        row["inputs"] = tuple(inputs)
        with apart(model.modules()):
            discovery = discover(model, inputs)
            row["kinds"] = {kind: judge(model, discovery, kind, inputs) for kind in KINDS}
            kept = _halves(discovery.blocks)
            for block in discovery.blocks:
                shrink(model, block, kept[block.name])
        if discovery.blocks:
            row.update(_stored(model, inputs, (model_type, head)))
    except (CannotBuildError, ValueError) as error:
        row["problem"] = str(error)
    except Exception as error:
        row["problem"] = f"the survey met {first_line(error)}"
    return Row(**row, seconds=round(time.perf_counter() - start, 2))


def judge(model: PreTrainedModel, discovery: Discovery, kind: str, inputs: Mapping[str, Any]) -> KindOutcome:
    """What became of one kind of block in a model, after a check of the blocks found."""
    blocks = [block for block in discovery.blocks if block.kind == kind]
    refused = {refusal.name: refusal.reason for refusal in discovery.refusals if refusal.kind == kind}
    refused |= _unknown(model, discovery, kind)
    if not blocks and not refused:
        return _nothing_found(model, discovery, kind)
    if not blocks:
        return KindOutcome("refused", 0, refused)
    difference = shrunk_difference(model, blocks, inputs)
    if queries := [block.queries for block in blocks if block.queries is not None]:
        difference = max(difference, shrunk_difference(model, queries, inputs))
    verdict = "wrong" if not difference <= TOLERANCE else "partly" if refused else "exact"
    return KindOutcome(verdict, len(blocks), refused, difference)


def _nothing_found(model: PreTrainedModel, discovery: Discovery, kind: str) -> KindOutcome:
    """Whether modules that look like this kind were missed, or are no such thing."""
    inside = [piece.tensor for block in discovery.blocks for piece in block.slices]
    inside += [f"{refusal.name}." for refusal in discovery.refusals]
    missed = any(not any(name.startswith(path) for name in inside) for path in _likely(model, kind))
    return KindOutcome("missed" if missed else "absent")


def _unknown(model: PreTrainedModel, discovery: Discovery, kind: str) -> dict[str, str]:
    """What was refused as something unknown in modules that look like this kind and hold no block of it."""
    inside = [piece.tensor for block in discovery.blocks if block.kind == kind for piece in block.slices]
    without = [path for path in _likely(model, kind) if not any(name.startswith(path) for name in inside)]
    return {
        refusal.name: refusal.reason
        for refusal in discovery.refusals
        if refusal.kind == "unknown" and any(f"{refusal.name}.".startswith(path) for path in without)
    }


def _likely(model: PreTrainedModel, kind: str) -> list[str]:
    """Paths, with a dot behind, of the modules whose class names look like this kind."""
    return [
        f"{path}."
        for path, module in model.named_modules()
        # A single matrix cannot make queries and keys: it is a gate.
        if kind in LIKELY and LIKELY[kind].search(type(module).__name__) and (kind != "attention" or _matrices(module))
    ]


def _matrices(module: nn.Module) -> bool:
    """Whether the module holds more than one."""
    return sum(parameter.ndim > 1 for parameter in module.parameters()) > 1


def half(block: Block, seed: int) -> torch.Tensor:
    """About half of a block's units (of each set), other ones for neighbouring seeds; `(k,)` int64, sorted."""
    random = torch.Generator().manual_seed(1000 + seed)
    size = block.units // block.sets
    count = min(max(size // 2 + seed % 2, 1), size)
    if block.stack is not None:  # grouped matrix products take multiples of 8 only
        count = max(count - count % 8, 1)
    chosen = [start + torch.randperm(size, generator=random)[:count] for start in range(0, block.units, size)]
    return torch.cat(chosen).sort().values


def _halves(blocks: Sequence[Block]) -> dict[str, torch.Tensor]:
    """Units to keep, by block: tied blocks keep the same ones, experts of one layer equally many of their own."""
    kept = {}
    for seed, group in enumerate(groups_of(blocks)):
        for number, block in enumerate(group.blocks):
            kept[block.name] = half(block, seed if block.tie is not None else seed + 2 * len(blocks) * number)
    return kept


def shrunk_difference(model: PreTrainedModel, blocks: Sequence[Block], inputs: Mapping[str, Any]) -> float:
    """Largest relative difference of outputs between `model` shrunk and with the removed units' weights at zero.

    It shares no code with the check that discovery makes: here the consumers' weights are zeroed in a copy, and other
    units are removed. An output is compared in units of its largest entry; a shrunk model that fails gives infinity.
    """
    zeroed = copy.deepcopy(model)
    kept = _halves(blocks)
    for block in blocks:
        _zero_removed(zeroed, block, kept[block.name])
    expected = outputs(zeroed, inputs)
    edits = [shrink(model, block, kept[block.name]) for block in blocks]
    try:
        return relative_difference(expected, outputs(model, inputs))
    except Exception:  # whatever a forward raises when shapes do not fit
        return float("inf")
    finally:
        for edit in reversed(edits):
            edit.undo()


@torch.no_grad()
def _zero_removed(model: nn.Module, block: Block, kept: torch.Tensor) -> None:
    removed = torch.ones(block.units, dtype=torch.bool)
    removed[kept] = False
    for piece in block.slices:
        if piece.tensor.rpartition(".")[0] == block.consumer:
            tensor = model.get_parameter(piece.tensor)
            tensor.index_fill_(piece.dim, piece.index[removed].flatten(), 0.0)


def outputs(model: PreTrainedModel, inputs: Mapping[str, Any]) -> list[torch.Tensor]:
    """Floating outputs of one forward in evaluation mode; models that draw random numbers draw the same ones."""
    with undisturbed(model), torch.no_grad():
        torch.manual_seed(0)
        return list(floating_tensors(model(**inputs)))


def relative_difference(expected: Sequence[torch.Tensor], found: Sequence[torch.Tensor]) -> float:
    """Largest difference between tensors, each in units of the largest finite entry expected; shapes must agree."""
    if [tensor.shape for tensor in expected] != [tensor.shape for tensor in found]:
        return float("inf")
    worst = 0.0
    for one, other in zip(expected, found, strict=True):
        finite = one.isfinite()
        if not torch.equal(finite, other.isfinite()):
            return float("inf")
        if finite.any():
            scale = one[finite].abs().max().clamp_min(torch.finfo(one.dtype).tiny)
            worst = max(worst, float((one[finite] - other[finite]).abs().max() / scale))
    return worst


def _stored(model: PreTrainedModel, inputs: Mapping[str, Any], item: tuple[str, str]) -> dict[str, str]:
    """Save a shrunk model, reload and compare; where that fails, the unpruned one as well."""
    try:
        layout = choose_layout(model, "ragged", inputs=inputs)
    except Exception as error:
        return {"layout": f"refused: {first_line(error)}", "reload": ""}
    reload = _reloaded(model, inputs)
    if reload != "exact" and (whole := _reloaded(tiny_model(*item), inputs)) != "exact":
        reload = f"{UNPRUNED}{whole}"
    return {"layout": layout.kind, "reload": reload}


def _reloaded(model: PreTrainedModel, inputs: Mapping[str, Any]) -> str:
    """What becomes of a model that is saved and reloaded."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            model.save_pretrained(folder)
            reloaded = type(model).from_pretrained(folder).eval()
            difference = relative_difference(outputs(model, inputs), outputs(reloaded, inputs))
        except Exception as error:
            return f"fails: {first_line(error)}"
    return "exact" if difference <= TOLERANCE else f"differs by {difference:.1e}"
