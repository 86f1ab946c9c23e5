"""The page: it holds what a report says, loads nothing, and takes names as text."""

import re
import sys
from dataclasses import replace
from html.parser import HTMLParser

from sample_report import make_block, make_report

from hf_subprune.blocks import Refusal
from hf_subprune.report.html import to_html
from hf_subprune.report.page import to_markdown
from hf_subprune.report.records import HTML_NAME

VOID = {"meta", "br"}


class Checked(HTMLParser):
    """Takes a page apart: texts, tags, and what it links."""

    def __init__(self, page):
        super().__init__()
        self.open, self.texts, self.tags, self.links = [], [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("href", "src", "srcset", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_the_page_says_what_the_report_does_and_loads_nothing():
    page = to_html(make_report(layers=3), "AutoTokenizer")
    checked = Checked(page)
    assert checked.open == [] and checked.links == []
    assert not re.search(r"@import|url\(|<script|<link", page)
    text = " ".join(" ".join(checked.texts).split())
    for part in ("2 M", "1.5 M", "75%", "40 ms", "cosine", "0.97", "accuracy, sst2 test", "[0.8, 0.95]"):
        assert part in text
    for part in (
        "layer.*.attn (32 units)",
        "Certificates",
        "Error against units kept",
        "Install extra[this] | leave it.",
    ):
        assert part in text
    assert 'model = BertModel.from_pretrained("DIR")' in text and "AutoTokenizer" in text
    assert "hf-subprune prune somebody/original --keep 0.75" in text
    assert '<span class="option">--keep</span>' in page  # a narrow page does not break it behind its first hyphen
    assert checked.tags.count("svg") == 2 + 2 + 2 + 6  # kept, errors, certificates, curves


def test_transcripts_stand_side_by_side_once_for_each_data_set():
    (accuracy,) = make_report().metrics
    examples = (("a <b>cat</b>", "a cat", "a cart"),)
    wer, cer = (replace(accuracy, name=name, dataset="spoken", examples=examples) for name in ("wer", "cer"))
    text = " ".join(Checked(to_html(make_report(metrics=(accuracy, wer, cer)))).texts)
    assert text.count("a cart") == text.count("spoken test, side by side") == 1
    assert "a <b>cat</b>" in text and "sst2 test, side by side" not in text
    page = to_markdown(make_report(metrics=(accuracy, wer, cer)))
    assert page.count("| a cart |") == page.count("## spoken test, side by side") == 1


def test_names_are_text_and_no_markup():
    name = "<script>alert(1)</script>.0.mlp"
    report = make_report(
        blocks=(make_block(name),), refusals=(Refusal(name, "mlp", name, name),), model=name, layout_reason=name
    )
    page = to_html(report)
    assert "<script" not in page and "&lt;script" in page


def test_a_report_without_curves_metrics_or_latency_has_a_page_too():
    report = make_report(
        blocks=(make_block(curve=(), guarantee=None),), metrics=(), latency=None, measured_on={}, layout="ragged"
    )
    page = to_html(report)
    assert Checked(page).open == []
    assert "import hf_subprune" in page and "Latency" not in page and "Certificates" not in page


def test_the_page_is_saved_with_the_report_and_needs_no_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    make_report().save(tmp_path)
    assert "<svg" in (tmp_path / HTML_NAME).read_text(encoding="utf-8")
