"""What a model costs (parameters, multiply-accumulates, latency) and how far its output drifted from another's."""

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.nn.functional import cosine_similarity, cross_entropy, kl_div, normalize
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from .calibration import Batch, is_divisible
from .execution import as_deployed, fast_products
from .offload import input_device
from .padding import token_mask
from .processes import from_all
from .stacked import apart, together
from .verification import floating_tensors, undisturbed

# Bytes of reference outputs that are held for one batch list; beyond that, evenly spaced tokens stand for all.
_STORED_BYTES = 64 * 2**20
_ROWS_AT_ONCE = 256

# Blocks of runs, or turns, that a median latency is taken over, whatever time that takes.
_FEWEST_BLOCKS = 3


@dataclass(frozen=True)
class Costs:
    """What a model costs, whatever it runs on.

    Args:
        parameters: Tied ones counted once.
        macs: Multiply-accumulates of one forward on one sample.
    """

    parameters: int
    macs: int


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
        cosine: Mean cosine between new and reference rows; hidden states only.
        embedding_cosine: The same for mean-pooled samples; hidden states only.
    """

    rows: int
    relative_error: float
    kl: float | None = None
    top1_agreement: float | None = None
    cosine: float | None = None
    embedding_cosine: float | None = None

    def to_dict(self) -> dict[str, float]:
        """The figures that apply to this kind of output."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def count_parameters(model: PreTrainedModel) -> int:
    """Number of parameters, tied ones counted once."""
    return model.num_parameters()


def count_macs(model: PreTrainedModel, batch: Batch) -> int:
    """Multiply-accumulates of one forward on the batch's first sample, at the batch's (padded) length.

    Matrix products, convolutions and attention scores are counted, a causal mask saves nothing. A batch whose tensors
    do not share their first dimension (patches of several images in one list) is counted as a whole. Of stacked
    experts, those that the router chooses for a token are counted.
    """
    sample = {name: value[:1] for name, value in batch.items()} if is_divisible(batch) else batch
    # The counter knows no formula for the fused attention of CPUs.
    formulas = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
    counter = FlopCounterMode(display=False, custom_mapping=formulas)
    # Nor for grouped products, which run stacked experts.
    with undisturbed(model), apart(model), torch.no_grad(), counter:
        model.requires_grad_(False)  # the counter follows gradients, of which there are none
        model(**_on_device(model, sample))
    return counter.get_total_flops() // 2


def _attention_flops(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    batch, heads, length, width = query
    return 2 * batch * heads * length * key[-2] * (width + value[-1])


def measure_latency(model: PreTrainedModel, batch: Batch, min_run_time: float = 0.2) -> float:
    """Median seconds of a forward on one batch, after a warm-up.

    Args:
        model: On whatever device it is to be measured.
        batch: Forward arguments; moved to that device before the clock starts.
        min_run_time: Seconds to measure for, at least.
    """
    batch = _on_device(model, batch)

    def run() -> None:
        model(**batch)
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()

    with undisturbed(model), together(model), as_deployed(), torch.inference_mode():
        run()
        timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
        times = timer.blocked_autorange(min_run_time=min_run_time).times
        while len(times) < _FEWEST_BLOCKS:
            times = times + timer.blocked_autorange(min_run_time=min_run_time).times
    return statistics.median(times)


def circumstances(model: PreTrainedModel, batch: Batch) -> dict[str, Any]:
    """What a latency depends on: batch size, length (`None` for images), device, dtype, threads."""
    ids = batch.get("input_ids")
    return {
        "batch_size": len(next(value for value in batch.values() if _is_batched(value))),
        "length": None if ids is None else ids.shape[1],
        "device": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else model.device.type,
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
    }


def measure_in_turn(models: Sequence[PreTrainedModel], batch: Batch, rounds: int = 10) -> list[list[float]]:
    """Seconds of forwards of several models in turn, so that whatever else runs slows all of them down alike.

    Args:
        models: Each on whatever device it is to be measured.
        batch: Forward arguments.
        rounds: Forwards of each model, after one to warm up.

    Returns:
        `rounds` lists of one time a model.
    """
    return [[_seconds(model, batch) for model in models] for _ in range(rounds + 1)][1:]


def _seconds(model: PreTrainedModel, batch: Batch) -> float:
    batch = _on_device(model, batch)
    with undisturbed(model), together(model), as_deployed(), torch.inference_mode():
        start = time.perf_counter()
        model(**batch)
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        return time.perf_counter() - start


def times_in_turn(
    model: PreTrainedModel,
    batch: Batch,
    changed: Callable[[], AbstractContextManager[None]],
    min_run_time: float,
) -> tuple[float, float]:
    """Median seconds of a forward outside and inside of `changed`, in turns: what else runs slows both down alike.

    Args:
        model: On whatever device it is to be measured.
        batch: Forward arguments.
        changed: Within it the model is another one.
        min_run_time: Seconds to measure for, at least.
    """
    turns: list[tuple[float, float]] = []
    while len(turns) <= _FEWEST_BLOCKS or sum(map(sum, turns[1:])) < min_run_time:
        outside = _seconds(model, batch)
        with changed():
            turns.append((outside, _seconds(model, batch)))
    outsides, insides = zip(*turns[1:], strict=True)  # the first turn warms up
    return statistics.median(outsides), statistics.median(insides)


def count(model: PreTrainedModel, batch: Batch) -> Costs:
    """Parameters, and multiply-accumulates on the batch's first sample."""
    return Costs(count_parameters(model), count_macs(model, batch))


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
    logits = False
    for old, batch in zip(reference, batches, strict=True):
        new = _outputs(model, batch, most=len(old.rows))
        if (old.kind, old.rows.shape) != (new.kind, new.rows.shape):
            shapes = [f"{which.kind} of shape {tuple(which.rows.shape)}" for which in (old, new)]
            raise ValueError(
                f"The outputs of the two models do not match: the reference gives {shapes[0]} for a batch, the other "
                f"model {shapes[1]}. Compare a pruned model with the model that it was made from."
            )
        logits = old.kind == "logits"
        rows += len(old.rows)
        for a, b in zip(old.rows.split(_ROWS_AT_ONCE), new.rows.split(_ROWS_AT_ONCE), strict=True):
            a, b = a.double(), b.double()
            sums["error"] += float((b - a).square().sum())
            sums["norm"] += float(a.square().sum())
            if logits:
                sums["kl"] += float(kl_div(b.log_softmax(1), a.log_softmax(1), reduction="sum", log_target=True))
                sums["same"] += float((a.argmax(1) == b.argmax(1)).sum())
            else:
                sums["cosine"] += float(cosine_similarity(a, b).sum())
        if old.pooled is not None and new.pooled is not None:
            samples += len(old.pooled)
            sums["pooled"] += float(cosine_similarity(old.pooled.double(), new.pooled.double()).sum())
    if shared:
        parts = from_all((sums, rows, samples, logits))
        sums = {name: sum(part[0][name] for part in parts) for name in sums}
        rows, samples, logits = sum(p[1] for p in parts), sum(p[2] for p in parts), any(p[3] for p in parts)
    if rows == 0:
        if batches:
            raise ValueError("Drift finds no real token to compare on: the batches' attention masks hide every one.")
        raise ValueError("Drift needs at least one batch to compare on.")
    return Drift(
        rows=rows,
        relative_error=math.sqrt(sums["error"] / sums["norm"]) if sums["norm"] else math.sqrt(sums["error"]),
        kl=sums["kl"] / rows if logits else None,
        top1_agreement=sums["same"] / rows if logits else None,
        cosine=None if logits else sums["cosine"] / rows,
        embedding_cosine=sums["pooled"] / samples if samples else None,
    )


def embed(model: PreTrainedModel, batches: Iterable[Batch]) -> torch.Tensor:
    """`(samples, k)` float32 on the CPU: last hidden states averaged over real tokens, of unit norm.

    Raises:
        ValueError: the model without its head gives no `last_hidden_state`.
    """
    encoder: Any = model.base_model
    pooled = [_mean_over_tokens(encoder, batch, _hidden(encoder, batch)) for batch in batches]
    return normalize(torch.cat(pooled).float(), dim=1)


def neighbour_agreement(first: torch.Tensor, second: torch.Tensor) -> float:
    """Fraction of samples whose nearest other sample is the same in both embeddings, `(samples, k)` each."""
    nearest = []
    for embeddings in (first, second):
        similarity = embeddings @ embeddings.T
        nearest.append(similarity.fill_diagonal_(-math.inf).argmax(1))
    return float((nearest[0] == nearest[1]).float().mean())


def log_losses(model: PreTrainedModel, batches: Iterable[Batch]) -> torch.Tensor:
    """Of a causal language model: `(samples, 2)` float64 on the CPU.

    The first column is the negative log-likelihood, in nats, of a sample's real tokens but the first one, the second
    the number of these tokens.

    Raises:
        ValueError: the model is no causal language model.
    """
    if not model.can_generate() or model.config.is_encoder_decoder:
        raise ValueError(f"Perplexity is that of a causal language model, which {type(model).__name__} is not.")
    found = []
    for batch in batches:
        logits = _forward(model, batch)["logits"][:, :-1].float()
        targets = batch["input_ids"][:, 1:].to(logits.device)
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))[:, 1:].bool().to(logits.device)
        losses = cross_entropy(logits.transpose(1, 2), targets, reduction="none").double() * mask
        found.append(torch.stack([losses.sum(1), mask.sum(1).double()], dim=1).cpu())
    return torch.cat(found)


def perplexity(model: PreTrainedModel, batches: Iterable[Batch]) -> float:
    """Of a causal language model: exp of the mean negative log-likelihood of every real token but each first one."""
    total, tokens = log_losses(model, batches).sum(0).tolist()
    return math.exp(total / tokens)


def predicted_classes(model: PreTrainedModel, batches: Iterable[Batch]) -> torch.Tensor:
    """Of a classifier: `(samples,)` int64 on the CPU, the most likely class of each sample.

    Raises:
        ValueError: the model's logits are not one row of two classes or more for each sample.
    """
    found = []
    for batch in batches:
        logits = _forward(model, batch).get("logits")
        if logits is None or logits.ndim != 2 or logits.shape[1] < 2:
            shape = "no logits" if logits is None else f"logits of shape {tuple(logits.shape)}"
            raise ValueError(f"{type(model).__name__} gives {shape} and is no classifier of samples.")
        found.append(logits.argmax(1).cpu())
    return torch.cat(found)


def _forward(model: PreTrainedModel, batch: Batch) -> Mapping[str, Any]:
    with undisturbed(model), fast_products(model), torch.no_grad():
        output = model(**_on_device(model, batch))
    return output if isinstance(output, Mapping) else ModelOutput({str(i): value for i, value in enumerate(output)})


def _on_device(model: PreTrainedModel, batch: Batch) -> dict[str, Any]:
    device = input_device(model)
    if device.type == "meta":  # weights are offloaded, and accelerate's hooks move the inputs
        return dict(batch)
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def _is_batched(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim > 0


def _outputs(model: PreTrainedModel, batch: Batch, *, room: int = 0, most: int | None = None) -> Outputs:
    """The rows of a batch's output that are compared: at most so many, or as many as `room` bytes hold."""
    kind, output = compared_output(_forward(model, batch))
    mask = token_mask(model, "", batch, output.shape)
    rows = output.reshape(-1, output.shape[-1])
    if mask is not None:
        rows = rows[mask.to(rows.device)]
    if most is None:
        most = max(1, room // (rows.shape[1] * rows.element_size()))
    count = min(len(rows), most)
    spaced = torch.linspace(0, len(rows) - 1, count, device=rows.device).round().long()
    pooled = _mean_over_tokens(model, batch, output) if kind == "hidden" and output.ndim == 3 else None
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


def _hidden(encoder: PreTrainedModel, batch: Batch) -> torch.Tensor:
    output = _forward(encoder, batch)
    if "last_hidden_state" not in output:
        raise ValueError(
            f"{type(encoder).__name__} gives no last_hidden_state to embed with, only {', '.join(output)}."
        )
    return output["last_hidden_state"]


def _mean_over_tokens(model: PreTrainedModel, batch: Batch, hidden: torch.Tensor) -> torch.Tensor:
    """`(samples, k)` on the CPU from hidden states `(samples, length, k)`."""
    mask = token_mask(model, "", batch, hidden.shape)
    if mask is None:
        return hidden.float().mean(1).cpu()
    weight = mask.view(hidden.shape[:2]).to(hidden.device).unsqueeze(-1)
    return ((hidden.float() * weight).sum(1) / weight.sum(1).clamp(min=1)).cpu()
