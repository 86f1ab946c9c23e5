"""What the user asks for: one strict dataclass, saved as sorted JSON."""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

CONFIG_NAME = "subprune_config.json"

UNIT_KINDS = ("mlp", "attention")
VARIANTS = ("layer", "seq", "asym")
LAYOUTS = ("auto", "stock", "ragged")


@dataclass
class PruneConfig:
    """How to prune a model. Every value is checked on construction and on assignment.

    Args:
        keep (`float` or `dict[str, float]`, default `0.5`):
            Fraction, in (0, 1], of the prunable blocks' parameters to keep; or one fraction per unit kind,
            `{"mlp": 0.5, "attention": 0.75}`, where a kind left out is kept whole.
        units (`tuple[str, ...]`, default `("mlp", "attention")`):
            Which kinds of units may be removed: `"mlp"` (neurons) and `"attention"` (heads; under grouped-query
            attention, a key/value head with all of its query heads).
        variant (`str`, default `"layer"`):
            The paper's reweighting objective: `"layer"` (LayerInChange), `"seq"` (SeqInChange) or `"asym"`
            (AsymInChange).
        layout (`str`, default `"auto"`):
            How the pruned model is stored. `"stock"`: equal widths in every layer, loads without this package;
            `"ragged"`: widths differ by layer; `"auto"`: stock where the architecture's config can say the widths.
        samples (`int`, default `128`):
            Number of unlabeled samples to fit on.
        held_out (`int`, default `32`):
            Number of further samples, never fitted on, that the report measures output drift on. When the data holds
            fewer than `samples + held_out`, a fifth of what there is is held out (at least one sample).
        max_length (`int`, default `256`):
            Tokens a text sample is truncated to.
        batch_size (`int`, default `16`):
            Samples in one calibration batch.
        reweight (`bool`, default `True`):
            Compute new weights for the layer that follows the removed units. `False` only removes.
        shrinkage (`"auto"` or `float`, default `"auto"`):
            Strength of the pull of the new weights towards the original ones, as a multiple of the mean squared
            activation (dimensionless, >= 0). `"auto"` chooses it per block by cross-fitting.
        round_to (`int`, default `1`):
            Widths of MLP blocks are rounded down to a multiple of this many units (never below one multiple).
        include (`tuple[str, ...]`, default `()`):
            Patterns (`fnmatch`) of block names; when given, only matching blocks are pruned.
        exclude (`tuple[str, ...]`, default `()`):
            Patterns (`fnmatch`) of block names that are left whole.
        seed (`int`, default `0`):
            Seed of the shuffling of streamed data and of every random choice.

    Raises:
        ValueError: a value is unknown or out of range; the message lists what is allowed.
        TypeError: a value has the wrong type.
    """

    keep: float | dict[str, float] = 0.5
    units: tuple[str, ...] = UNIT_KINDS
    variant: str = "layer"
    layout: str = "auto"
    samples: int = 128
    held_out: int = 32
    max_length: int = 256
    batch_size: int = 16
    reweight: bool = True
    shrinkage: float | str = "auto"
    round_to: int = 1
    include: tuple[str, ...] = field(default=())
    exclude: tuple[str, ...] = field(default=())
    seed: int = 0
