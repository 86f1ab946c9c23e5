"""The first forward on the data: what fails there is told as a matter of the data."""

import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from transformers import PreTrainedModel

from ..models.running import Batch, first_line, forward_outputs
from ..models.sizes import Sizes
from ..runs.memory import is_of_the_machine
from .batches import Samples
from .features import most_positions, text_config
from .probe import is_divisible, samples_in


def largest(batches: Sequence[Batch]) -> Batch:
    """Two samples of the batch whose samples are largest, all of it where it cannot be cut."""

    def size(batch: Batch) -> float:
        return sum(value.numel() for value in batch.values() if isinstance(value, torch.Tensor)) / samples_in(batch)

    batch = max(batches, key=size)
    return {name: value[:2] for name, value in batch.items()} if is_divisible(batch) else dict(batch)


def check_forward(samples: Samples) -> None:
    """Run the model on two of the largest samples.

    Raises:
        ValueError: the forward fails. It names the batch's tensors, the sample or the column without which the forward
            runs, and what the model takes.
        RuntimeError: there is no memory for it.
    """
    _check(samples, largest((*samples.fit, *samples.held_out)))


def _check(samples: Samples, batch: Batch) -> None:
    model, error = samples.model, _failure(samples.model, batch)
    if error is None:
        return
    if isinstance(error, RuntimeError) and should_reduce_batch_size(error):
        raise error
    tensors = ", ".join(f"{name} {_described(value)}" for name, value in batch.items())
    raise ValueError(
        f"The calibration data ({samples.source}) does not fit {type(model).__name__}: its forward fails on "
        f"{samples_in(batch)} samples, {tensors}: {first_line(error)}. {''.join(_culprits(model, batch))}It takes "
        f"{'; '.join(_wanted(model, batch))}. Prepare the data with the processing class that was saved with the "
        "model, or pass ready batches, dicts that model(**batch) takes."
    ) from error


@contextmanager
def blamed_on_data(samples: Samples) -> Iterator[None]:
    """What fails inside is an error as of `check_forward`, should the data be at fault.

    All of the data is run for errors that others raise, as forwards do; the model must be as it was by then.
    """
    try:
        yield
    except Exception as error:
        if not is_of_the_machine(error):
            check_forward(samples)
            for batch in () if _is_ours(error) else (*samples.fit, *samples.held_out):
                _check(samples, batch)
        raise


def _is_ours(error: Exception) -> bool:
    """Whether an error was raised by this package."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__", "")).partition(".")[0] == __name__.partition(".")[0]


def _failure(model: PreTrainedModel, batch: Batch) -> Exception | None:
    try:
        forward_outputs(model, batch)
    except Exception as error:  # whatever a forward raises when its inputs are not to its liking
        return error
    return None


def _described(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"


def _culprits(model: PreTrainedModel, batch: Batch) -> Iterator[str]:
    """Sentences on what the forward runs without."""
    if is_divisible(batch) and samples_in(batch) == 2:
        alone = [{name: value[row : row + 1] for name, value in batch.items()} for row in range(2)]
        failing = [row for row, one in enumerate(alone) if _failure(model, one) is not None]
        if len(failing) == 1:
            yield f"The {('first', 'second')[failing[0]]} sample fails alone, the other one runs. "
    for name in batch if len(batch) > 1 else ():
        if _failure(model, {other: value for other, value in batch.items() if other != name}) is None:
            yield f"Without the column {name!r} it runs. "


def _wanted(model: PreTrainedModel, batch: Batch) -> Iterator[str]:
    """What the model takes, as far as its signature and its config say."""
    sizes, parameters = Sizes(model.config), signature(model.forward).parameters
    names = [name for name, parameter in parameters.items() if parameter.kind is not parameter.VAR_KEYWORD]
    if "input_ids" in batch:
        vocabulary, longest = getattr(text_config(model.config), "vocab_size", None), most_positions(model)
        limits = [f"below {vocabulary}"] if vocabulary else []
        limits += [f"at most {longest} a sample"] if longest else []
        yield f"token ids {', '.join(limits)}".rstrip()
    if "pixel_values" in batch:
        yield f"images of {sizes.channels} channels, {sizes.side[0]} x {sizes.side[1]} by its config"
    if "input_features" in batch:
        yield f"spectrograms of {sizes.bins} bins"
    yield f"the arguments {', '.join(names)}"
