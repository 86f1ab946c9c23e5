"""A report made by hand, for what reads reports: its figures are nobody's measurement."""

from dataclasses import replace
from typing import Any

from hf_subprune.blocks import Refusal
from hf_subprune.report.records import BlockReport, Change, TaskMetric
from hf_subprune.report.report import PruneReport

CURVE = ((8, 0.9, 0.95), (16, 0.6, 0.7), (24, 0.2, 0.28))


def make_block(name: str = "layer.0.mlp", **changes: Any) -> BlockReport:
    block = BlockReport(
        name=name,
        kind="attention" if "attn" in name else "mlp",
        consumer=f"{name}.out",
        units_before=32,
        units_after=24,
        kept_units=tuple(range(24)),
        kept_columns=tuple(range(24)),
        fitted_error=0.21,
        held_out_error=0.3,
        shrinkage=0.1,
        method="greedy",
        guarantee=0.9,
        seconds=0.5,
        curve=CURVE,
    )
    return replace(block, **changes)


def make_report(layers: int = 2, **changes: Any) -> PruneReport:
    report = PruneReport(
        model="somebody/original",
        architecture="BertModel",
        config={"keep": 0.75, "units": ["mlp", "attention"], "seed": 0},
        blocks=tuple(make_block(f"layer.{i}.{part}") for i in range(layers) for part in ("attn", "mlp")),
        refusals=(Refusal("pooler", "mlp", "Its output is the model's.", "Install extra[this] | leave it."),),
        layout="stock",
        layout_reason="intermediate_size=24 says it",
        parameters=Change(2e6, 1.5e6),
        macs=Change(4e9, 2e9),
        latency=Change(0.04, 0.03),
        measured_on={"batch_size": 4, "length": 16, "device": "cpu", "threads": 2},
        drift={"rows": 90, "cosine": 0.97, "relative_error": 0.05},
        data={"source": "list of str", "fit_samples": 6, "held_out_samples": 2, "fit_tokens": 90},
        seconds={"calibration": 1.0, "selection": 2.0},
        peak_memory=500_000_000,
        versions={"hf_subprune": "0.1.0", "torch": "2.6"},
        metrics=(TaskMetric("accuracy", "text-classification", "sst2", "test", 100, Change(0.9, 0.88), (0.8, 0.95)),),
        command="hf-subprune prune somebody/original --keep 0.75",
    )
    return replace(report, **changes)
