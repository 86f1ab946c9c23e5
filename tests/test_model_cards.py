"""The rendered examples are whole, and what the package renders from their reports."""

import importlib.util
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from hf_subprune.report.report import PruneReport
from hf_subprune.report.tables import markdown_table, summary_table

EXAMPLES = Path(__file__).parent.parent / "model_cards"
FOLDERS = sorted(path.parent for path in EXAMPLES.glob("*/subprune_report.json"))


def test_there_is_one_of_each_layout():
    assert {PruneReport.load(folder).layout for folder in FOLDERS} == {"stock", "ragged"}
    listed = set(re.findall(r"\(([\w-]+)/README\.md\)", (EXAMPLES / "README.md").read_text(encoding="utf-8")))
    assert listed == {folder.name for folder in FOLDERS}


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_card_shows_the_figures_of_its_report_and_no_path_of_a_machine(folder):
    report, card = PruneReport.load(folder), ModelCard.load(folder / "README.md")
    assert set(markdown_table(summary_table(report)).splitlines()) <= set(card.text.splitlines())
    assert card.data.base_model == report.model == "sentence-transformers/all-MiniLM-L6-v2"
    assert card.data.license == "apache-2.0"
    assert [metric.name for metric in report.metrics] == ["embedding_cosine"]
    links = re.findall(r"!\[.+?\]\((.+?)\)", card.text)
    assert links and all((folder / link).is_file() for link in links)
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 1_000_000
    for path in (*folder.glob("*.md"), *folder.glob("*.json")):
        assert not re.search(r"(?<![\w.:/])/(usr|home|root|opt|tmp)/", path.read_text(encoding="utf-8"))


@pytest.mark.slow
def test_the_examples_can_be_rendered_again(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    spec = importlib.util.spec_from_file_location("render", EXAMPLES / "render.py")
    render = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(render)
    name, settings = next(iter(render.EXAMPLES.items()))
    monkeypatch.setattr(render, "EXAMPLES", {name: settings})
    (folder,) = render.main(["--out", str(tmp_path), "--samples", "8", "--unseen", "8"])
    assert {path.relative_to(folder) for path in folder.rglob("*.*")} >= {
        path.relative_to(EXAMPLES / name) for path in (EXAMPLES / name).glob("*.*")
    }
