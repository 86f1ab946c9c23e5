"""A small synthetic batch for any `PreTrainedModel`, made from its forward's signature and its configuration."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..models.offload import device_of
from ..models.running import undisturbed
from ..models.sizes import Sizes
from ..runs.memory import is_of_the_machine
from .input_makers import COMPANIONS, MAKERS, MODALITIES, PLACEHOLDERS, SAMPLES, TOKENS, Inputs

MOST_TRIES = 24
MOST_ERRORS = 4


def probe_inputs(model: nn.Module) -> Inputs:
    """Make two small random samples that the model's forward accepts, with every modality that it takes if possible.

    A forward's signature says which tensors it takes, the configuration (with its sub-configurations) their sizes.
    Where an argument has several usual layouts, such as images in batches or in lists of patches, the first with which
    the forward runs is taken. Token ids avoid the special ones and one sample is padded.

    Args:
        model: A `PreTrainedModel`; the same afterwards.

    Returns:
        Keyword arguments of the forward, on the model's device; floating inputs in the model's dtype.

    Raises:
        ValueError: The forward runs with nothing that was made; it lists the forward's arguments and the first errors.
    """
    parameter = next(model.parameters(), torch.zeros(()))
    errors: dict[str, None] = {}
    for inputs in itertools.islice(_candidates(model), MOST_TRIES):
        placed = {name: _placed(value, parameter) for name, value in inputs.items()}
        try:
            with undisturbed(model), torch.no_grad():
                model(**placed)
        except Exception as error:  # whatever a forward raises when its inputs are not to its liking
            if is_of_the_machine(error):
                raise
            shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in placed.items())
            errors[f"{shapes or 'no inputs'}: {type(error).__name__}: {str(error).strip()[:200]}"] = None
        else:
            return placed
    arguments = ", ".join(inspect.signature(model.forward).parameters)
    raise ValueError(
        f"No probe batch could be made for {type(model).__name__}, whose forward takes {arguments}. Tried "
        f"{'; '.join(list(errors)[:MOST_ERRORS]) or 'nothing'}. Pass `inputs`, a small batch of your own."
    )


def _placed(value: Any, like: torch.Tensor) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(device_of(like), like.dtype if value.is_floating_point() else value.dtype)


def _candidates(model: nn.Module) -> Iterator[Inputs]:
    """Batches to try: all modalities first, then the main one; each with the layouts that its arguments can have."""
    parameters = inspect.signature(model.forward).parameters
    sizes = Sizes(model.config)
    known = {name: MAKERS[name] for name in parameters if name in MAKERS}
    required = [
        name
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]
    main = [name for name in _main_inputs(model) if name in parameters]
    if "decoder_input_ids" in parameters and "inputs_embeds" not in required:
        main.append("decoder_input_ids")
    modalities = [name for name in MODALITIES if name in parameters]
    for wanted in dict.fromkeys(tuple(dict.fromkeys(names)) for names in _choices(required, main, modalities)):
        if not known.keys() >= set(wanted):
            continue
        companions = [name for group in wanted for name in COMPANIONS.get(group, ()) if name in parameters]
        names = list(dict.fromkeys([*wanted, *companions]))
        for layouts in itertools.islice(itertools.product(*(known[name] for name in names)), MOST_TRIES // 2):
            inputs = {name: layout(sizes, model) for name, layout in zip(names, layouts, strict=True)}
            yield from _with_placeholders(model, {k: v for k, v in inputs.items() if v is not None})


def _main_inputs(model: nn.Module) -> list[str]:
    names = getattr(model, "main_input_name", "input_ids")
    return list(names) if isinstance(names, (list, tuple)) else [names]


def _choices(required: list[str], main: list[str], modalities: list[str]) -> Iterator[list[str]]:
    yield [*required, *modalities, *main]
    for modality in modalities:
        yield [*required, "input_ids", *main, modality] if "input_ids" in modalities else [*required, *main, modality]
    yield [*required, *main]
    yield required
    for modality in modalities:
        yield [*required, modality]


def _with_placeholders(model: nn.Module, inputs: Inputs) -> Iterator[Inputs]:
    """`inputs` with as many placeholder tokens in the text as the images and sounds beside it fill."""
    if "input_ids" not in inputs:
        yield inputs
        return
    sizes = Sizes(model.config)
    placeholders: list[int] = []
    for name, method, tokens in PLACEHOLDERS:
        token = sizes.get(*tokens)
        if name in inputs and isinstance(token, int):
            placeholders += [token] * (_features(model, method, inputs) // SAMPLES)
    if placeholders:
        row = torch.tensor(placeholders).expand(SAMPLES, -1)
        kinds = torch.cat([torch.zeros(SAMPLES, 1), torch.ones_like(row), torch.zeros(SAMPLES, TOKENS - 1)], 1)
        inputs = dict(inputs)
        inputs["input_ids"] = torch.cat([inputs["input_ids"][:, :1], row, inputs["input_ids"][:, 1:]], 1)
        if "attention_mask" in inputs:
            inputs["attention_mask"] = torch.cat([torch.ones_like(row), inputs["attention_mask"]], 1)
        for name in ("mm_token_type_ids", "token_type_ids"):
            if name in inspect.signature(model.forward).parameters:
                inputs[name] = kinds.long()
    yield inputs


def _features(model: nn.Module, method: str, inputs: Inputs) -> int:
    """Hidden states that a modality becomes; 0 if the model does not say."""
    owner = next((module for module in model.modules() if hasattr(module, method)), None)
    if owner is None:
        return 0
    function = getattr(owner, method)
    accepted = inspect.signature(inspect.unwrap(function)).parameters
    parameter = next(model.parameters())
    given = {name: _placed(value, parameter) for name, value in inputs.items() if name in accepted}
    given.pop("attention_mask", None)
    try:
        with undisturbed(model), torch.no_grad():
            output = function(**given)
    except Exception as error:  # the forward says what is wrong with the inputs
        if is_of_the_machine(error):
            raise
        return 0
    output = getattr(output, "pooler_output", output)
    rows = output if isinstance(output, (list, tuple)) else [output]
    return sum(row.numel() // row.shape[-1] for row in rows if isinstance(row, torch.Tensor))
