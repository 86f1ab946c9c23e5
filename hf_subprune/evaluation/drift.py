"""How far a model's output drifted from another's."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.nn.functional import cosine_similarity, kl_div
from transformers import PreTrainedModel

from ..data.padding import token_mask
from ..models.running import Batch, floating_tensors, forward_outputs
from ..runs.processes import from_all

# Bytes of reference outputs that are held for one batch list; beyond that, evenly spaced tokens stand for all.
_STORED_BYTES = 100 * 2**20
_ROWS_AT_ONCE = 256


@dataclass(frozen=True, eq=False)
class Outputs:
    """What is compared of one batch's output.

    Args:
        kind: `"logits"`, or `"hidden"` for anything that is no distribution over classes.
        rows: `(tokens, k)` on the CPU, of real tokens only (of samples where the output has one row per sample);
            at most what the limit on stored bytes allows, evenly spaced.
        pooled: `(samples, k)`, mean over a sample's real tokens; `None` for logits, or without a token dimension.
    """

    kind: str
    rows: torch.Tensor
    pooled: torch.Tensor | None


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
    """

    rows: int
    relative_error: float
    kl: float | None = None
    top1_agreement: float | None = None
    cosine: float | None = None
    embedding_cosine: float | None = None

    @property
    def distance(self) -> float:
        """What repairs are to lower: the divergence where there is one, else the relative error."""
        return self.relative_error if self.kl is None else self.kl

    def to_dict(self) -> dict[str, float]:
        """The figures that apply to this kind of output."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def model_outputs(model: PreTrainedModel, batches: Sequence[Batch]) -> list[Outputs]:
    """The reference that `drift` compares with, to be taken before the model changes."""
    return list(iter_outputs(model, batches))


def iter_outputs(model: PreTrainedModel, batches: Sequence[Batch]) -> Iterator[Outputs]:
    """As `model_outputs`, one batch at a time: nothing is stored when both models are at hand."""
    for batch in batches:
        yield _outputs(model, batch, room=_STORED_BYTES // len(batches))


def drift(
    model: PreTrainedModel, batches: Sequence[Batch], reference: Iterable[Outputs], *, shared: bool = False
) -> Drift:
    """How far the model's outputs are from the reference ones.

    Args:
        model: The changed model.
        batches: Those that the reference was computed on.
        reference: `model_outputs(original, batches)`, or `iter_outputs` of it; the rows that it holds are compared.
        shared: Whether other processes have further batches, for one figure over all.

    Raises:
        ValueError: there is no batch, or no real token in any, or the outputs are of other kinds or shapes.
    """
    sums: dict[str, float] = dict.fromkeys(("error", "norm", "kl", "same", "cosine", "pooled"), 0.0)
    rows = samples = 0
    logits, width = False, 0
    for old, batch in zip(reference, batches, strict=True):
        new = _outputs(model, batch, most=len(old.rows))
        if (old.kind, old.rows.shape) != (new.kind, new.rows.shape):
            shapes = [f"{which.kind} of shape {tuple(which.rows.shape)}" for which in (old, new)]
            raise ValueError(
                f"The outputs of the two models do not match: the reference gives {shapes[0]} for a batch, the other "
                f"model {shapes[1]}. Compare a pruned model with the model that it was made from."
            )
        logits, width = old.kind == "logits", old.rows.shape[1]
        rows += len(old.rows)
        for a, b in zip(old.rows.split(_ROWS_AT_ONCE), new.rows.split(_ROWS_AT_ONCE), strict=True):
            a, b = a.float(), b.float()
            sums["error"] += _summed((b - a).square())
            sums["norm"] += _summed(a.square())
            if logits:
                sums["kl"] += _summed(kl_div(b.log_softmax(1), a.log_softmax(1), reduction="none", log_target=True))
                sums["same"] += float((a.argmax(1) == b.argmax(1)).sum())
            else:
                sums["cosine"] += float(cosine_similarity(a, b).sum())
        if old.pooled is not None and new.pooled is not None:
            samples += len(old.pooled)
            sums["pooled"] += float(cosine_similarity(old.pooled.double(), new.pooled.double()).sum())
    if shared:
        parts = from_all((sums, rows, samples, logits, width))
        sums = {name: sum(part[0][name] for part in parts) for name in sums}
        rows, samples, logits = sum(p[1] for p in parts), sum(p[2] for p in parts), any(p[3] for p in parts)
        width = max(p[4] for p in parts)
    if rows == 0:
        if batches:
            raise ValueError("Drift finds no real token to compare on: the batches' attention masks hide every one.")
        raise ValueError("Drift needs at least one batch to compare on.")
    directed = width > 1  # a vector with one entry has no direction, only a sign
    return Drift(
        rows=rows,
        relative_error=math.sqrt(sums["error"] / sums["norm"]) if sums["norm"] else math.sqrt(sums["error"]),
        kl=sums["kl"] / rows if logits else None,
        top1_agreement=sums["same"] / rows if logits else None,
        cosine=sums["cosine"] / rows if directed and not logits else None,
        embedding_cosine=sums["pooled"] / samples if directed and samples else None,
    )


def _summed(values: torch.Tensor) -> float:
    """The sum of `(rows, k)`; rows are added up in float64."""
    return float(values.sum(1).sum(dtype=torch.float64))


def _outputs(model: PreTrainedModel, batch: Batch, *, room: int = 0, most: int | None = None) -> Outputs:
    """The rows of a batch's output that are compared: at most so many, or as many as `room` bytes hold."""
    kind, output = compared_output(forward_outputs(model, batch))
    mask = token_mask(model, "", batch, output.shape)
    rows = output.reshape(-1, output.shape[-1])
    if mask is not None:
        rows = rows[mask.to(rows.device)]
    if most is None:
        most = max(1, room // (rows.shape[1] * rows.element_size()))
    count = min(len(rows), most)
    spaced = torch.linspace(0, len(rows) - 1, count, device=rows.device).round().long()
    pooled = mean_over_tokens(model, batch, output) if kind == "hidden" and output.ndim == 3 else None
    return Outputs(kind, rows[spaced].cpu(), pooled)


def compared_output(output: Mapping[str, Any]) -> tuple[str, torch.Tensor]:
    """The tensor that stands for a model's output: logits over classes, else hidden states, else the first one."""
    logits = output.get("logits")
    if isinstance(logits, torch.Tensor) and logits.ndim >= 2 and logits.shape[-1] > 1:
        return "logits", logits
    for tensor in floating_tensors([output.get("last_hidden_state"), output]):
        if tensor.ndim > 0:
            return "hidden", tensor
    raise ValueError(f"The model's output has no floating-point tensor to compare, found: {', '.join(output)}.")


def mean_over_tokens(model: PreTrainedModel, batch: Batch, hidden: torch.Tensor) -> torch.Tensor:
    """`(samples, k)` on the CPU from hidden states `(samples, length, k)`."""
    mask = token_mask(model, "", batch, hidden.shape)
    if mask is None:
        return hidden.float().mean(1).cpu()
    weight = mask.view(hidden.shape[:2]).to(hidden.device).unsqueeze(-1)
    return ((hidden.float() * weight).sum(1) / weight.sum(1).clamp(min=1)).cpu()
