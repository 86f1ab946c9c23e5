import re
import sys

import pytest
from sample_report import make_report

from hf_subprune.report.page import save
from hf_subprune.report.records import PAGE_NAME


def test_the_page_links_the_plots_that_were_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    save(make_report(), tmp_path)
    links = re.findall(r"!\[.+?\]\((.+?)\)", (tmp_path / PAGE_NAME).read_text())
    assert len(links) == 4
    assert sorted(links) == sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.png"))


def test_without_matplotlib_the_page_has_no_plots(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    save(make_report(), tmp_path)
    page = (tmp_path / PAGE_NAME).read_text()
    assert "![" not in page and "## Left whole" in page and "hf-subprune prune" in page
    assert not list(tmp_path.rglob("*.png"))
