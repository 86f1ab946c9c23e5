"""Train a pruned model to do what the original does, on unlabeled samples (distillation)."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from inspect import signature
from typing import Any

import torch
from rich.table import Table
from torch import nn
from torch.nn.functional import kl_div
from torch.nn.utils import clip_grad_norm_
from transformers import PreTrainedModel, get_scheduler
from transformers.utils import logging

from ..config import PruneConfig
from ..data.batches import Samples
from ..data.padding import token_mask
from ..data.reading import read
from ..data.trial import check_forward
from ..evaluation.drift import Drift, drift
from ..evaluation.outputs import model_outputs
from ..models.running import Batch, as_mapping, undisturbed
from ..models.session import check_prunable
from ..report.tables import html_table, render

logger = logging.get_logger(__name__)

_WARMUP = 0.1
_MAX_GRADIENT_NORM = 1.0
_LORA_RANK = 16


@dataclass(frozen=True, repr=False)
class Recovery:
    """What `recover` reached; printed as a table.

    Args:
        before: Drift of the pruned model from the teacher, on held-out samples.
        after: The same after training, whether or not the trained weights were kept.
        kept: Whether they were; if not, every weight is as it was.
        losses: Of every step, on the batch that it trained on.
        data: Description of the data.
    """

    before: Drift
    after: Drift
    kept: bool
    losses: tuple[float, ...]
    data: dict[str, Any]

    def table(self) -> Table:
        """Drift before and after, as a rich table."""
        table = Table(title="Recovery", title_justify="left")
        for name in ("", "before", "after"):
            table.add_column(name, justify="right" if name else "left")
        after = self.after.to_dict()
        for name, value in self.before.to_dict().items():
            if name != "rows":
                table.add_row(f"held-out {name.replace('_', ' ')}", f"{value:.4g}", f"{after[name]:.4g}")
        table.caption = f"{len(self.losses)} steps, loss {self.losses[0]:.4g} to {self.losses[-1]:.4g}. " + (
            "The trained weights were kept." if self.kept else "The drift did not fall: every weight is as it was."
        )
        table.caption_justify = "left"
        return table

    def __str__(self) -> str:
        return render(self.table())

    def __repr__(self) -> str:
        drift = f"drift {self.before.distance:.4g} to {self.after.distance:.4g}"
        return f"Recovery({len(self.losses)} steps, {drift}, {'kept' if self.kept else 'put back'})"

    def _repr_html_(self) -> str:
        return html_table(self.table())


def recover(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    data: Any,
    processing_class: Any = None,
    *,
    steps: int = 200,
    learning_rate: float | None = None,
    lora: Any = None,
    config: PruneConfig | Mapping[str, Any] | None = None,
) -> Recovery:
    """Distil the original model into the pruned one, on samples without labels.

    Each step takes one batch and descends, with AdamW, the Kullback-Leibler divergence of the model's distribution
    from the teacher's, averaged over real tokens. Where there is no distribution for each token, it is the squared
    error of every hidden state on real tokens, relative to the teacher's and averaged over layers, plus the divergence
    of a classifier's one. (Of a language model they are no help: where one token holds nearly all of a layer's energy,
    they are about that token.) Dropout is off. Whether it helped is measured on samples
    that were never trained on: unless their drift fell, the weights are put back.

    Args:
        model: Pruned; trained in place. Half precision is trained in float32 and rounded at the end.
        teacher: The model that it was pruned from: loaded again, or a copy taken before `prune`. Unchanged.
        data: As for `prune`, best the same.
        processing_class: As for `prune`.
        steps: Optimizer steps.
        learning_rate: Largest one, after a linear warm-up and before a linear decay; left out, 1e-4, or 1e-3 with
            LoRA.
        lora: Train low-rank adapters, which are merged afterwards, instead of the weights: `True`, a rank, or a
            `peft.LoraConfig`. Needs PEFT (`pip install 'hf_subprune[lora]'`).
        config: What it says of data is read as by `prune` (`samples`, `held_out`, `max_length`, `packing`,
            `batch_size`, `skip_unreadable`, `seed`, and `shrinkage`, which says how few samples will do), so that the
            same config holds out the same samples.

    Raises:
        TypeError: `steps` or `learning_rate` is no number.
        ValueError: `steps`, `learning_rate` or the rank of `lora` is not positive, the models' outputs do not have the
            same shapes, or a model cannot be trained as it is (quantized, adapters, frozen), or the data does not fit.
            Nothing was changed.
        ImportError: `lora` without PEFT.
        FloatingPointError: a loss is not finite; the weights are put back.
    """
    config = PruneConfig.of(config)
    learning_rate = learning_rate if learning_rate is not None else 1e-3 if lora else 1e-4
    if not isinstance(steps, int) or not isinstance(learning_rate, int | float):
        raise TypeError(f"`steps` must be an int and `learning_rate` a float; got {steps!r} and {learning_rate!r}.")
    if isinstance(lora, int) and lora < 0:
        raise ValueError(f"`lora` is the rank of adapters, 1 or more, or True; got {lora}.")
    if steps < 1 or not 0 < learning_rate < math.inf:
        raise ValueError(f"`steps` and `learning_rate` must be positive; got {steps} and {learning_rate}.")
    check_prunable(model)
    check_prunable(teacher)
    if teacher is model:
        raise ValueError("`teacher` is the pruned model itself: load the original one again.")
    if not any(parameter.requires_grad for parameter in model.parameters()) and not lora:
        raise ValueError("No parameter of `model` requires a gradient: unfreeze some, or pass `lora`.")
    if lora and not find_spec("peft"):
        raise ImportError("`lora` needs PEFT: pip install 'hf_subprune[lora]'")
    calibration = read(teacher, data, config, processing_class)
    check_forward(calibration)
    reference = model_outputs(teacher, calibration.held_out)
    before = drift(model, calibration.held_out, reference)
    with undisturbed(teacher), undisturbed(model), _put_back_unless_kept(model) as keep, torch.enable_grad():
        torch.manual_seed(config.seed)
        with _in_float32(model), _adapted(model, lora) as student:
            losses = tuple(_train(student, teacher, calibration, steps, learning_rate, config.seed))
        after = drift(model, calibration.held_out, reference)
        kept = after.distance < before.distance
        if kept:
            keep()
        else:
            logger.warning("Recovery did not lower the drift on held-out samples: the weights are put back.")
    return Recovery(before, after, kept, losses, calibration.description)


def _train(
    student: nn.Module,
    teacher: PreTrainedModel,
    calibration: Samples,
    steps: int,
    learning_rate: float,
    seed: int,
) -> Iterator[float]:
    """Make the steps, each on one batch, in an order that is new for every pass; yield their losses."""
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    scheduler = get_scheduler("linear", optimizer, math.ceil(_WARMUP * steps), steps)
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for step in range(steps):
        order = order or torch.randperm(len(calibration.fit), generator=generator).tolist()
        batch = calibration.fit[order.pop()]
        with torch.no_grad():
            targets = _outputs(teacher, teacher, batch)
        loss = _loss(_outputs(student, teacher, batch), targets, teacher, batch)
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"The loss of step {step + 1} is {loss.item()}: lower learning_rate={learning_rate:g}."
            )
        optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_(parameters, _MAX_GRADIENT_NORM)
        optimizer.step()
        scheduler.step()
        yield loss.item()
    optimizer.zero_grad()


def _outputs(model: nn.Module, teacher: PreTrainedModel, batch: Batch) -> dict[str, torch.Tensor]:
    """Logits if each token has some; else hidden states by name and layer, and logits, or every floating output."""
    device = next(model.parameters()).device
    arguments: dict[str, Any] = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()
    }
    parameters = signature(type(teacher).forward).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    if "use_cache" in parameters:
        arguments["use_cache"] = False
    flags = {name: True for name in ("output_hidden_states", "return_dict") if takes_any or name in parameters}
    output = as_mapping(model(**arguments, **flags))
    tensors = {name: value for name, value in output.items() if isinstance(value, torch.Tensor)}
    if "logits" in tensors and tensors["logits"].ndim > 2 and tensors["logits"].shape[-1] > 1:
        return {"logits": tensors["logits"]}
    found = {
        f"{name}.{layer}": value
        for name, values in output.items()
        if name.endswith("hidden_states") and isinstance(values, tuple)
        for layer, value in enumerate(values)
    }
    if "logits" in tensors:
        found["logits"] = tensors["logits"]
    return found or {name: value for name, value in tensors.items() if value.is_floating_point()}


def _loss(
    outputs: Mapping[str, torch.Tensor], targets: Mapping[str, torch.Tensor], teacher: PreTrainedModel, batch: Batch
) -> torch.Tensor:
    """Mean relative squared error of the hidden states plus the divergence of the logits."""
    errors, divergence = [], torch.zeros((), device=next(iter(outputs.values())).device)
    for name, target in targets.items():
        output = outputs.get(name)
        if output is None or output.shape != target.shape:
            found = "none" if output is None else tuple(output.shape)
            raise ValueError(f"The teacher's output {name} has shape {tuple(target.shape)}, the model's {found}.")
        new, old = (_real(x.float(), name, teacher, batch) for x in (output, target.to(output.device)))
        if name == "logits" and old.shape[-1] > 1:
            divergence = kl_div(new.log_softmax(-1), old.log_softmax(-1), reduction="sum", log_target=True) / len(old)
        else:
            errors.append((new - old).square().sum() / old.square().sum())
    return torch.stack(errors).mean() + divergence if errors else divergence


def _real(x: torch.Tensor, name: str, teacher: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """`(tokens, k)`: the rows of an output that are real tokens."""
    part = ""
    if name.startswith("encoder"):
        encoder = teacher.get_encoder()
        part = next(path for path, module in teacher.named_modules() if module is encoder)
    mask = token_mask(teacher, part, batch, x.shape)
    rows = x.reshape(-1, x.shape[-1])
    return rows if mask is None else rows[mask.to(rows.device)]


@contextmanager
def _put_back_unless_kept(model: nn.Module) -> Iterator[Callable[[], None]]:
    """On exit every parameter has the value from before, unless the function yielded was called."""
    before = [(parameter, parameter.detach().clone()) for parameter in model.parameters()]
    try:
        yield before.clear
    finally:
        with torch.no_grad():
            for parameter, value in before:
                parameter.copy_(value)


@contextmanager
def _in_float32(model: nn.Module) -> Iterator[None]:
    """Inside, half precision parameters and buffers are float32."""
    half = [(parameter, parameter.dtype) for parameter in model.parameters() if parameter.dtype.itemsize < 4]
    if half:
        model.float()
    try:
        yield
    finally:
        for parameter, dtype in half:
            parameter.data = parameter.data.to(dtype)


@contextmanager
def _adapted(model: PreTrainedModel, lora: Any) -> Iterator[nn.Module]:
    """The model with low-rank adapters, merged on exit; the model itself without `lora`."""
    if not lora:
        yield model
        return
    from peft import LoraConfig, get_peft_model

    if not isinstance(lora, LoraConfig):
        rank = _LORA_RANK if lora is True else lora
        lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    adapted = get_peft_model(model, lora)
    try:
        yield adapted
    finally:
        adapted.merge_and_unload()  # type: ignore[operator]
