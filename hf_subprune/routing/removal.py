"""Take whole experts out of a model, as its config asks, and report what that did."""

import time
from dataclasses import replace

from accelerate.utils import send_to_device

from ..blocks import Refusal
from ..config import PruneConfig
from ..data.batches import Samples
from ..models.running import input_device
from ..report.records import BlockReport
from ..runs.progress import timed
from ..runs.workspace import Workspace
from ..surgery.edits import assign, shrink
from .choice import Removal, choose_experts, fit_experts
from .layers import RoutedLayer, exact_layers, routed_layers, verify_routed
from .tokens import tokens_of


def without_experts(config: PruneConfig) -> tuple[float, PruneConfig | None]:
    """The fraction of the experts to keep, and the config of what comes then, if anything does.

    Raises:
        ValueError: the config does not say the fraction.
    """
    others = tuple(kind for kind in config.units if kind != "experts")
    if isinstance(config.keep, dict) and "experts" in config.keep:
        keep = {kind: fraction for kind, fraction in config.keep.items() if kind != "experts"}
        return config.keep["experts"], replace(config, units=others, keep=keep) if others and keep else None
    if isinstance(config.keep, float | int) and not others:
        return config.keep, None
    raise ValueError(
        f"Removing whole experts takes `keep`, as a dict with a fraction for them where other units go too, such as "
        f"keep={{'experts': 0.75, 'mlp': 0.5}}; got {config.target()}={getattr(config, config.target())!r} with "
        f"units={list(config.units)}."
    )


def remove_experts(
    samples: Samples, config: PruneConfig, fraction: float, work: Workspace
) -> tuple[tuple[BlockReport, ...], tuple[Refusal, ...]]:
    """Take the same fraction of the experts out of every layer.

    Args:
        samples: What is calibrated on, and the model, its experts stacked; it is changed.
        config: What was asked for.
        fraction: Of the experts of each layer, to keep.
        work: Its `undo` puts the experts back.

    Raises:
        ValueError: there is no layer of which experts can be taken, or too few would be left for its router.
    """
    model, clock = samples.model, work.clock
    probe = send_to_device(samples.probe, input_device(model))
    with clock("discovery"):
        layers, refusals = routed_layers(model, probe)
        layers, inexact = exact_layers(model, layers, probe)
    refusals += inexact
    if not layers:
        why = "".join(f"\n  {refusal.name}: {refusal.reason}." for refusal in refusals)
        raise ValueError(f"{type(model).__name__} has no layer of which whole experts can be removed.{why}")
    left = {routed.block.name: int(fraction * routed.block.units + 1e-9) for routed in layers}
    for routed in layers:
        name, units = routed.block.name, routed.block.units
        if left[name] < routed.chosen:
            raise ValueError(
                f"keep={fraction} would leave {left[name]} of {units} experts in {name}, whose router sends "
                f"each token to {routed.chosen}: keep {routed.chosen / units:.3g} or more of the experts."
            )
    removals: list[tuple[RoutedLayer, Removal, float]] = []
    for tokens in timed(tokens_of(layers, samples), clock, "calibration"):
        start = time.perf_counter()
        with clock("selection"):
            routed = tokens.routed
            kept = choose_experts(tokens, left[routed.block.name])
            fitted = fit_experts(tokens, kept, shrinkage=config.shrinkage, reweight_kept=config.reweight)
        removals.append((routed, fitted, time.perf_counter() - start))
    with clock("verification"):
        kept_of = {routed.block.name: removal.kept for routed, removal, _ in removals}
        verify_routed(model, [routed for routed, _, _ in removals], kept_of, probe)
    reports = []
    for routed, removal, seconds in removals:
        if len(removal.kept) < routed.block.units:
            work.undo.callback(shrink(model, routed.block, removal.kept).undo)
            work.undo.callback(assign(model, routed.block.name, removal.parameters).undo)
        reports.append(
            replace(
                BlockReport.whole(routed.block),
                units_after=len(removal.kept),
                kept_units=tuple(removal.kept.tolist()),
                kept_columns=tuple(removal.kept.tolist()),
                fitted_error=removal.fitted_error,
                held_out_error=removal.held_out_error,
                method="removal one by one",
                guarantee=None,
                seconds=seconds,
            )
        )
    return tuple(reports), tuple(refusals)
