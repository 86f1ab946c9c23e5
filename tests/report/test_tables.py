import re
from dataclasses import replace

import pytest
from sample_report import make_block, make_report

from hf_subprune import PruneConfig
from hf_subprune.report.tables import in_words, markdown_table, metric_table, refusal_table, summary_table


def test_tables_are_markdown_with_numbers_to_the_right_and_no_cell_lost():
    report = make_report()
    rows = markdown_table(summary_table(report)).split("\n\n")[0].splitlines()
    assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1
    assert rows[:3] == [
        "|  | before | after | ratio |",
        "| --- | ---: | ---: | ---: |",
        "| parameters | 2 M | 1.5 M | 0.750 |",
    ]
    assert "| accuracy, sst2 test | 0.9 [0.8, 0.95] | 0.88 | 0.978 |" in rows


def test_a_task_has_its_change_with_an_interval():
    metric = replace(make_report().metrics[0], after_interval=(0.7, 0.93), change_interval=(-0.04, 0.01))
    rows = markdown_table(metric_table([metric])).splitlines()
    assert rows[2] == "| accuracy | 0.9 [0.8, 0.95] | 0.88 [0.7, 0.93] | -0.02 [-0.04, 0.01] |"
    assert "95% intervals of the paired bootstrap over 100 samples" in rows[-1]


def test_brackets_and_bars_in_an_advice_survive():
    rows = markdown_table(refusal_table(make_report().refusals)).splitlines()
    assert rows[2] == r"| pooler | mlp | Its output is the model's. | Install extra[this] \| leave it. |"


def test_a_terminal_sees_every_block():
    text = str(make_report(layers=3))
    assert all(block.name in text for block in make_report(layers=3).blocks)
    assert ">=90.0%" in text
    assert ">=" not in str(make_report(blocks=(make_block(guarantee=None),)))


def test_in_a_notebook_a_report_is_text_all_the_same(monkeypatch):
    printed = str(make_report())
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    assert str(make_report()) == printed


def test_what_was_measured_on_is_said_in_words():
    on = {"batch_size": 4, "length": 16, "device": "cpu", "threads": 1}
    assert in_words(on) == "batch 4, length 16, cpu, 1 thread"
    assert in_words({**on, "length": None, "threads": 2}) == "batch 4, cpu, 2 threads"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"variant": "layer"}, False),
        ({"variant": "residual"}, True),
        ({"variant": "residual", "reweight": False}, False),
        ({"variant": "asym", "reweight": False}, True),
    ],
)
def test_errors_that_include_those_of_earlier_blocks_are_said_to(settings, said):
    report = replace(make_report(), config=PruneConfig(**settings).to_dict())
    assert ("what earlier blocks have done" in " ".join(str(report).split())) == said
