"""Samples and ready batches to batches to fit on and to hold out."""

import itertools
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from ..config import PruneConfig
from ..models.running import Batch
from .batches import cut_batches
from .features import Accepts, Features
from .probe import is_divisible, samples_in

# Ready batches that are read, however many samples they hold, where they cannot be cut: for two folds and to hold out.
_FEWEST_UNCUT = 3


def _fewest_to_fit(found: int, config: PruneConfig, kind: str) -> int:
    """How many must be fitted on, where enough were found to hold out one more."""
    to_fit = 2 if config.shrinkage == "auto" else 1
    if found <= to_fit:
        raise ValueError(
            f"Calibration needs at least {to_fit + 1} {kind} with shrinkage={config.shrinkage!r}: {to_fit} to fit on "
            f"and 1 held out. Found {found}."
        )
    return to_fit


def counts_of(found: int, config: PruneConfig) -> tuple[int, int]:
    """Samples to fit on and to hold out, of those found."""
    _fewest_to_fit(found, config, "samples that are not blank")
    fit = min(config.samples, found - max(1, found // 5))
    if found >= config.samples + config.held_out:
        fit = config.samples
    return fit, min(config.held_out, found - fit)


def group_by_length(samples: list[Features], batch_size: int, folds: int = 1) -> list[list[Features]]:
    """Samples of like length together, in equal groups whose number is a multiple of `folds` where it can be."""
    ordered = sorted(samples, key=lambda features: len(features["input_ids"]) if "input_ids" in features else 0)
    count = -(-len(ordered) // (batch_size * folds)) * folds
    bounds = np.linspace(0, len(ordered), min(count, len(ordered)) + 1).astype(int)
    return [ordered[start:stop] for start, stop in itertools.pairwise(bounds)]


def collate(samples: list[Features], pad_id: int) -> Batch:
    """Stack samples; token-like columns are padded on the right, waveforms are cut to the shortest."""
    batch: Batch = {}
    for name in samples[0]:
        values = [features[name] for features in samples]
        if len({value.shape for value in values}) == 1:
            batch[name] = torch.stack(values)
        elif values[0].ndim == 1 and not values[0].is_floating_point():
            fill = pad_id if name.endswith("input_ids") else 0
            batch[name] = nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=fill)
        elif len({value.shape[1:] for value in values}) == 1 and name != "pixel_values":
            shortest = min(map(len, values))
            batch[name] = torch.stack([value[:shortest] for value in values])
        else:
            raise ValueError(
                f"{name} of one batch must have one shape, found {sorted({tuple(value.shape) for value in values})}: "
                "make the processor resize to one size, or set batch_size=1."
            )
    return batch


def read_ready(items: Iterable[Any], accepts: Accepts, wanted: int) -> list[Batch]:
    """Ready batches, labels dropped, until they hold the wanted number of samples, in three at least if uncut."""
    batches: list[Batch] = []
    found = 0
    for item in items:
        if not accepts.is_batch(item):
            raise TypeError(f"Ready batches must all be dicts of tensors, found {type(item).__name__}.")
        batch = {name: value for name, value in item.items() if value is not None and not accepts.is_label(name)}
        batches.append(batch)
        found += samples_in(batch)
        if found >= wanted and (len(batches) >= _FEWEST_UNCUT or all(map(is_divisible, batches))):
            break
    return batches


Split = tuple[list[Batch], list[Batch], tuple[int, int]]
"""Batches to fit on, those to hold out, and how many samples there are in each of the two."""


@dataclass(frozen=True)
class Ready:
    """Ready batches: cut along the first dimension where every tensor of them shares it, else whole."""

    batches: list[Batch]

    def together(self, config: PruneConfig) -> list[Batch]:
        """Batches of at most `config.samples` samples in all, none set aside."""
        if all(map(is_divisible, self.batches)):
            return cut_batches(self.batches, 0, config.samples, config.batch_size)
        return self.batches

    def split(self, config: PruneConfig) -> Split:
        """Batches to fit on, and to hold out.

        Raises:
            ValueError: there are too few.
        """
        batches = self.batches
        if all(map(is_divisible, batches)):
            fit, held_out = counts_of(sum(map(samples_in, batches)), config)
            largest = min(config.batch_size, -(-fit // 2))
            return (
                cut_batches(batches, 0, fit, largest),
                cut_batches(batches, fit, fit + held_out, config.batch_size),
                (fit, held_out),
            )
        found = len(batches)
        fewest = _fewest_to_fit(found, config, "batches whose tensors do not share a first dimension")
        samples = list(itertools.accumulate(map(samples_in, batches)))
        fit = max(fewest, min(bisect_left(samples, config.samples) + 1, found - max(1, found // 5)))
        return batches[:fit], batches[fit:], (samples[fit - 1], samples[-1] - samples[fit - 1])


@dataclass(frozen=True)
class Encoded:
    """Samples that were encoded one by one, padded in batches with the token `pad_id`."""

    samples: list[Features]
    pad_id: int

    def together(self, config: PruneConfig) -> list[Batch]:
        """Batches of all samples, none set aside."""
        return self._batches(self.samples, config)

    def split(self, config: PruneConfig) -> Split:
        """Batches to fit on, and to hold out.

        Raises:
            ValueError: there are too few samples.
        """
        fit, held_out = counts_of(len(self.samples), config)
        last = fit + held_out
        return (
            self._batches(self.samples[:fit], config, folds=2),
            self._batches(self.samples[fit:last], config),
            (fit, held_out),
        )

    def _batches(self, samples: list[Features], config: PruneConfig, folds: int = 1) -> list[Batch]:
        return [collate(group, self.pad_id) for group in group_by_length(samples, config.batch_size, folds)]
