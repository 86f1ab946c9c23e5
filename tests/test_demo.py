import re

import pytest
from transformers import AutoModel

from hf_subprune.demo import run_demo
from hf_subprune.report.report import PruneReport
from hf_subprune.report.tables import render


@pytest.mark.slow
def test_the_demo_beats_the_baseline_on_unseen_text_and_loads_again(tmp_path):
    printed = render(run_demo(tmp_path / "out", fitted=64, held_out=16, unseen=128), width=200)
    row = next(line for line in printed.splitlines() if "cosine to the original" in line)
    original, ours, baseline = map(float, re.findall(r"\d\.\d+", row))
    assert original == 1
    assert ours >= 0.9
    assert baseline < ours - 0.1
    assert float(re.search(r"largest\s+difference\s+([\d.e-]*\d)", printed)[1]) < 1e-5
    report = PruneReport.load(tmp_path / "out")
    assert {(b.kind, b.units_after / b.units_before) for b in report.blocks} == {("mlp", 0.5), ("attention", 1.0)}
    assert AutoModel.from_pretrained(tmp_path / "out").config.intermediate_size == 768
