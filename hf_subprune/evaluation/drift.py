"""How far a model's output drifted from another's."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

import torch
from torch.linalg import vecdot, vector_norm
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedModel

from ..data.batches import cut_to_logits
from ..models.running import Batch
from ..runs.processes import from_all
from .intervals import Interval, ratio_interval
from .outputs import Outputs, outputs_like

# Numbers of outputs that are compared at once.
_COMPARED_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Drift:
    """How far a model's output is from the reference, over real tokens.

    Args:
        rows: Tokens (or samples) compared.
        relative_error: `||new - reference||_F / ||reference||_F`.
        kl: Mean Kullback-Leibler divergence of the new distribution from the reference one, nats; logits only.
        top1_agreement: Fraction of rows with the same most likely class; logits only.
        cosine: Mean cosine between new and reference rows; hidden states of two entries or more only.
        embedding_cosine: The same for mean-pooled samples.
        intervals: By figure, its 95% confidence interval over samples, where there are two or more.
    """

    rows: int
    relative_error: float
    kl: float | None = None
    top1_agreement: float | None = None
    cosine: float | None = None
    embedding_cosine: float | None = None
    intervals: Mapping[str, Interval] = field(default_factory=dict)

    @property
    def distance(self) -> float:
        """What repairs are to lower: the divergence where there is one, else the relative error."""
        return self.relative_error if self.kl is None else self.kl

    def to_dict(self) -> dict[str, float]:
        """The figures that apply to this kind of output."""
        figures = {name: value for name, value in asdict(self).items() if value is not None}
        del figures["intervals"]
        return figures


def drift(
    model: PreTrainedModel, batches: Sequence[Batch], reference: Iterable[Outputs], *, shared: bool = False
) -> Drift:
    """How far the model's outputs are from the reference ones.

    Args:
        model: The changed model.
        batches: Those that the reference was computed on.
        reference: `outputs.model_outputs(original, batches)`, or `iter_outputs` of it; the rows that it holds are
            compared.
        shared: Whether other processes have further batches, for one figure over all.

    Raises:
        ValueError: there is no batch, or no real token in any, or the outputs are of other kinds or shapes.
    """
    parts = (part for batch in batches for part in cut_to_logits(model, batch))
    tables: list[dict[str, torch.Tensor]] = []
    for old, part in zip(reference, parts, strict=True):
        new = outputs_like(model, part, old)
        if (old.kind, old.rows.shape) != (new.kind, new.rows.shape):
            shapes = [f"{which.kind} of shape {tuple(which.rows.shape)}" for which in (old, new)]
            raise ValueError(
                f"The outputs of the two models do not match: the reference gives {shapes[0]} for a batch, the other "
                f"model {shapes[1]}. Compare a pruned model with the model that it was made from."
            )
        tables.append(_by_sample(old, new))
    if shared:
        tables = [table for theirs in from_all(tables) for table in theirs]
    names = {name for table in tables for name in table}
    sums = {name: torch.cat([table[name] for table in tables if name in table]) for name in names}
    if not tables or int(sums["rows"].sum()) == 0:
        if batches:
            raise ValueError("Drift finds no real token to compare on: the batches' attention masks hide every one.")
        raise ValueError("Drift needs at least one batch to compare on.")
    return _of_sums(sums)


_FIGURES = {
    "kl": ("kl", "rows"),
    "top1_agreement": ("same", "rows"),
    "cosine": ("cosine", "rows"),
    "embedding_cosine": ("pooled", "vectors"),
}
"""Figures that are means: what is summed, and the sum of what it is divided by."""


def _of_sums(sums: Mapping[str, torch.Tensor]) -> Drift:
    """The figures, from sums by sample."""
    squared = float(sums["norm"].sum())
    figures = {"relative_error": math.sqrt(float(sums["error"].sum()) / (squared or 1.0))}
    intervals: dict[str, Interval] = {}
    if squared and (found := ratio_interval(sums["error"], sums["norm"])):
        intervals["relative_error"] = math.sqrt(max(found[0], 0.0)), math.sqrt(found[1])
    for name, (part, whole) in _FIGURES.items():
        if part in sums:
            figures[name] = float(sums[part].sum() / sums[whole].sum())
            if found := ratio_interval(sums[part], sums[whole]):
                low, high = (0.0, math.inf) if name == "kl" else (0.0 if name == "top1_agreement" else -1.0, 1.0)
                intervals[name] = max(found[0], low), min(found[1], high)
    return Drift(rows=int(sums["rows"].sum()), intervals=intervals, **figures)


def _by_sample(old: Outputs, new: Outputs) -> dict[str, torch.Tensor]:
    """What is compared, `(samples,)` float64 each: summed over the rows of each sample."""
    rows, width = old.rows.shape
    count = int(old.samples.max()) + 1 if rows else 0
    found: dict[str, list[torch.Tensor]] = {}

    def add(name: str, values: torch.Tensor) -> None:
        found.setdefault(name, []).append(values.double())

    at_once = max(1, _COMPARED_AT_ONCE // width)
    for a, b in zip(old.rows.split(at_once), new.rows.split(at_once), strict=True):
        a, b = a.float(), b.float()
        add("rows", torch.ones(len(a)))
        add("error", vector_norm(b - a, dim=1).square())
        add("norm", vector_norm(a, dim=1).square())
        if old.kind == "logits":
            p, q = a.log_softmax(1), b.log_softmax(1)
            add("kl", vecdot(p.exp(), p.sub_(q)))
            add("same", a.argmax(1) == b.argmax(1))
        elif width > 1:  # a vector with one entry has no direction, only a sign
            add("cosine", cosine_similarity(a, b))
    sums = {
        name: torch.zeros(count, dtype=torch.float64).index_add_(0, old.samples, torch.cat(values))
        for name, values in found.items()
    }
    if old.pooled is not None and new.pooled is not None and width > 1:
        sums["pooled"] = cosine_similarity(old.pooled.double(), new.pooled.double())
        sums["vectors"] = torch.ones(len(old.pooled), dtype=torch.float64)
    return sums
