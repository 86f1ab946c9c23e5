from sample_report import make_report

from hf_subprune.report.records import PAGE_NAME, Record
from hf_subprune.report.report import PruneReport


def test_a_saved_report_loads_as_it_was(tmp_path):
    report = make_report()
    path = report.save(tmp_path / "new" / "folder")
    assert PruneReport.load(path) == report
    assert PruneReport.load(path.parent) == report
    assert isinstance(PruneReport.load(path), PruneReport) and isinstance(report, Record)


def test_a_saved_page_is_the_one_that_the_report_gives(tmp_path):
    report = make_report()
    report.save(tmp_path)
    page = (tmp_path / PAGE_NAME).read_text()
    assert [part for part in page.split("\n\n") if not part.startswith("![")] == report.to_markdown().split("\n\n")


def test_a_notebook_shows_tables_and_a_prompt_one_line():
    report = make_report(layers=40)
    shown = report._repr_html_()
    assert shown.count("<table>") == 2 and "BertModel pruned, stock layout" in shown and "layer.39.mlp" in shown
    assert repr(report) == "PruneReport(BertModel, 2 M to 1.5 M parameters, 80 blocks)"
