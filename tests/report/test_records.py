import json
from dataclasses import replace

import pytest
from sample_report import make_report

from hf_subprune.report.report import PruneReport


def test_figures_that_came_later_may_be_missing():
    values = json.loads(json.dumps(make_report().to_dict()))
    for block in values["blocks"]:
        del block["curve"]
    del values["metrics"], values["command"]
    report = PruneReport.from_dict(values)
    assert report.metrics == () and report.command == "" and report.blocks[0].curve == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format 2"),
        ({"colour": "red"}, r"unknown fields \['colour'\]"),
        ({"macs": {"before": 1.0}}, "after"),
        ({"metrics": [{"name": "accuracy"}]}, "value"),
    ],
)
def test_other_files_are_refused_with_the_file_and_what_is_wrong(tmp_path, change, message):
    path = tmp_path / "subprune_report.json"
    path.write_text(json.dumps({**make_report().to_dict(), **change}))
    with pytest.raises(ValueError, match=message) as error:
        PruneReport.load(tmp_path)
    assert str(path) in str(error.value)


def test_a_missing_report_is_named_with_what_to_give(tmp_path):
    for given, wanted in ((tmp_path, tmp_path / "subprune_report.json"), (tmp_path / "none", tmp_path / "none")):
        with pytest.raises(FileNotFoundError) as error:
            PruneReport.load(given)
        assert f"No pruning report at {wanted}: give a folder that holds subprune_report.json" in str(error.value)


def test_a_missing_field_is_named(tmp_path):
    values = make_report().to_dict()
    del values["macs"]
    with pytest.raises(ValueError, match=r"missing fields \['macs'\]"):
        PruneReport.from_dict(values)


def test_new_metrics_replace_those_of_the_same_name_on_the_same_data():
    report = make_report()
    (old,) = report.metrics
    new, other = replace(old, samples=3), replace(old, split="dev")
    assert report.with_metrics([new, other]).metrics == (new, other)
    assert report.with_metrics([other]).metrics == (old, other)
    assert PruneReport.from_dict(json.loads(json.dumps(report.with_metrics([new]).to_dict()))).metrics == (new,)
