"""Samples and ready batches to batches to fit on and to hold out."""

import itertools
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..config import PruneConfig
from ..models.running import Batch
from .batches import cut_batches
from .features import Accepts, Sample
from .probe import is_divisible, samples_in

# Ready batches that are read, however many samples they hold, where they cannot be cut: for two folds and to hold out.
_FEWEST_UNCUT = 3
# Part of batches that may be padding, or of waveforms that may be cut.
_MOST_WASTED = 0.04


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


def group_by_length(
    samples: Sequence[Sample], batch_size: int, folds: int = 1, token_axis: int = 0
) -> list[list[Sample]]:
    """Samples of like length together, dealt out so that each fold gets as many, of the same lengths.

    Args:
        samples: In any order.
        batch_size: Most samples in a group; there are fewer where too much would be padding, or be cut.
        folds: Every one of so many groups that follow one another is of another fold.
        token_axis: As for `collate`.
    """
    if not samples:
        return []
    ordered = sorted(samples, key=lambda sample: _length(sample, token_axis))
    lanes = [ordered[fold::folds] for fold in range(folds)]
    lengths = np.array([_length(sample, token_axis) for sample in lanes[0]])
    bounds = _bounds(lengths, batch_size, padded="input_ids" in samples[0].features)
    return [lane[start:stop] for start, stop in itertools.pairwise(bounds) for lane in lanes if lane[start:stop]]


def _bounds(lengths: np.ndarray, batch_size: int, padded: bool) -> list[int]:
    """Where to part sorted lengths: equally, and on wherever most is gained until little is padding, or is cut."""

    def wasted(start: int, stop: int) -> int:
        part = lengths[start:stop]
        return int(len(part) * part[-1] - part.sum() if padded else part.sum() - len(part) * part[0])

    def gain(start: int, at: int, stop: int) -> int:
        return wasted(start, stop) - wasted(start, at) - wasted(at, stop)

    bounds = np.linspace(0, len(lengths), -(-len(lengths) // batch_size) + 1).astype(int).tolist()
    while True:
        parts = list(itertools.pairwise(bounds))
        waste = sum(itertools.starmap(wasted, parts))
        whole = lengths.sum() + (waste if padded else 0)
        if waste <= _MOST_WASTED * whole:
            return bounds
        places = [(start, at, stop) for start, stop in parts for at in range(start + 1, stop)]
        bounds = sorted([*bounds, max(places, key=lambda place: gain(*place))[1]])


def _length(sample: Sample, token_axis: int = 0) -> int:
    """Tokens of a sample, or values where it has no tokens."""
    ids = sample.features.get("input_ids")
    if ids is not None:
        return ids.shape[token_axis]
    return max((value.numel() for value in sample.features.values()), default=0)


def uncut(samples: Iterable[Sample], batch_size: int) -> Iterator[list[Sample]]:
    """Samples in their order, at most so many together, those without tokens of one length: `collate` cuts none."""
    group: list[Sample] = []
    for sample in samples:
        differs = group and "input_ids" not in sample.features and _length(sample) != _length(group[0])
        if differs or len(group) == batch_size:
            yield group
            group = []
        group.append(sample)
    if group:
        yield group


def collate(samples: Sequence[Sample], pad_id: int, token_axis: int = 0) -> Batch:
    """Stack samples; what has an entry a token is padded on the right, waveforms are cut to the shortest.

    Args:
        samples: With the same columns.
        pad_id: Token to pad with.
        token_axis: Of a sample's token ids, the dimension along which the tokens lie.
    """
    batch: Batch = {}
    tokens = [_length(sample, token_axis) for sample in samples] if "input_ids" in samples[0].features else None
    for name in samples[0].features:
        if missing := [sample for sample in samples if name not in sample.features]:
            raise ValueError(
                f"Samples of one batch must have the same columns; {len(missing)} of {len(samples)} lack {name!r}."
            )
        values = [sample.features[name] for sample in samples]
        fill = pad_id if name.endswith("input_ids") else 0
        if len({value.shape for value in values}) == 1:
            batch[name] = torch.stack(values)
        elif [value.shape[token_axis] if value.ndim > token_axis else None for value in values] == tokens:
            batch[name] = _padded(values, token_axis, fill)
        elif values[0].ndim == 1 and not values[0].is_floating_point():
            batch[name] = _padded(values, 0, fill)
        elif len({value.shape[1:] for value in values}) == 1 and name != "pixel_values":
            shortest = min(map(len, values))
            batch[name] = torch.stack([value[:shortest] for value in values])
        else:
            raise ValueError(
                f"{name} of one batch must have one shape, found {sorted({tuple(value.shape) for value in values})}: "
                "make the processor resize to one size, or set batch_size=1."
            )
    return batch


def _padded(values: Sequence[torch.Tensor], axis: int, fill: int) -> torch.Tensor:
    longest = max(value.shape[axis] for value in values)
    whole = [value.new_full((*value.shape[:axis], longest, *value.shape[axis + 1 :]), fill) for value in values]
    for one, value in zip(whole, values, strict=True):
        one.narrow(axis, 0, value.shape[axis]).copy_(value)
    return torch.stack(whole)


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


Split = tuple[list[Batch], list[Batch], tuple[int, int], float]
"""Batches to fit on, those to hold out, how many samples there are in each, and what part of them was cut."""


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
                0.0,
            )
        found = len(batches)
        fewest = _fewest_to_fit(found, config, "batches whose tensors do not share a first dimension")
        samples = list(itertools.accumulate(map(samples_in, batches)))
        fit = max(fewest, min(bisect_left(samples, config.samples) + 1, found - max(1, found // 5)))
        return batches[:fit], batches[fit:], (samples[fit - 1], samples[-1] - samples[fit - 1]), 0.0


@dataclass(frozen=True)
class Encoded:
    """Samples that were encoded one by one.

    Args:
        samples: As they were read.
        pad_id: Token to pad batches with.
        token_axis: As for `collate`.
    """

    samples: list[Sample]
    pad_id: int
    token_axis: int = 0

    def together(self, config: PruneConfig) -> list[Batch]:
        """Batches of all samples, none set aside."""
        return self._batches(self.samples, config)

    def split(self, config: PruneConfig) -> Split:
        """Batches to fit on, and to hold out.

        Raises:
            ValueError: there are too few samples.
        """
        fit, held_out = counts_of(len(self.samples), config)
        used = self.samples[: fit + held_out]
        first, second = self._batches(used[:fit], config, folds=2), self._batches(used[fit:], config)
        return first, second, (fit, held_out), _share_cut(used, first + second, self.token_axis)

    def _batches(self, samples: Sequence[Sample], config: PruneConfig, folds: int = 1) -> list[Batch]:
        groups = group_by_length(samples, config.batch_size, folds, self.token_axis)
        return [collate(group, self.pad_id, self.token_axis) for group in groups]


def _share_cut(samples: Sequence[Sample], batches: Sequence[Batch], token_axis: int) -> float:
    """What part of samples did not get into batches: of their tokens, or else of their values."""
    given = sum(_length(sample, token_axis) for sample in samples)
    if "input_ids" in samples[0].features:
        cut = sum(sample.cut for sample in samples)
        return cut / (given + cut)
    kept = sum(max(value.numel() for value in batch.values()) for batch in batches)
    return max(0.0, 1 - kept / given) if given else 0.0
