import pytest
from rich.console import Console
from sample_report import make_block, make_report

from hf_subprune.report.card import model_card
from hf_subprune.report.page import to_markdown
from hf_subprune.report.plain import code, fenced, inline, printable, without_local, without_paths
from hf_subprune.report.tables import block_table, render

EVIL = "x](https://ok)\n\n<script>alert(1)</script>\n\n# Owned\n```\n{{ 7 * 7 }} \x1b[2J\u202e"


@pytest.mark.parametrize("make", [inline, code, fenced])
def test_nothing_is_markup(make):
    text = make(EVIL)
    assert not any(mark in text for mark in ("<", "# Owned", "{{", "```", "\n", "\x1b", "\u202e"))


def test_plain_text_stays():
    assert inline("kept >=99% [0.1, 0.2] layers.* self_attn") == "kept >=99% [0.1, 0.2] layers.* self_attn"
    assert code("keep={'mlp': 0.5}") == "`keep={'mlp': 0.5}`"
    command = "hf-subprune prune a/b --keep '{\"mlp\": 0.5}' --data texts.txt"
    assert fenced(command) == command


def test_ends_of_lines_can_be_kept():
    assert printable("a\nb\x07", keep="\n") == "a\nb "


@pytest.mark.parametrize(
    "changes",
    [
        {"command": f"hf-subprune prune {EVIL}"},
        {"data": {**make_report().data, "source": EVIL}},
        {"model": EVIL},
        {"versions": {EVIL: EVIL}},
        {"architecture": EVIL},
        {"layout_reason": EVIL},
        {"config": {"include": [EVIL]}},
        {"blocks": (make_block(EVIL),)},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_cards_and_pages_show_what_others_chose_as_text(changes):
    report = make_report(**changes)
    for text in (str(model_card(report, "user/small")), to_markdown(report)):
        assert not any(mark in text for mark in ("<script", "\n# Owned", "{{", "\x1b", "\u202e"))


def test_another_card_passes_on_words_only(tmp_path):
    (tmp_path / "README.md").write_text(
        "---\nlicense: \"mit\\n---\\n# out\"\npipeline_tag: '{{ 7*7 }}'\nlanguage: en\nbase_model: '[x](y)'\n---\n"
    )
    data = model_card(make_report(model=str(tmp_path)), "user/small").data.to_dict()
    assert data["language"] == "en" and not {"license", "pipeline_tag", "base_model"} & set(data)


def test_control_characters_do_not_reach_a_terminal():
    table = block_table(make_report(blocks=(make_block("layer\x1b[2J\x07.mlp"),)))
    console = Console(file=None, record=True, markup=False, quiet=True)
    console.print(table)
    assert "\x1b[2J" not in render(table)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/home/alice/data.csv", "data.csv"),
        ("--data=/home/alice/data.csv", "--data=data.csv"),
        ("~alice/data.csv, ../b/c.txt", "data.csv, c.txt"),
        (r"C:\Users\alice\x.txt", "x.txt"),
        ("file:///home/alice/x", "x"),
        ("https://huggingface.co/a/b", "https://huggingface.co/a/b"),
        ("user/name, keep/0.5", "user/name, keep/0.5"),
    ],
)
def test_paths_are_cut_to_their_last_part(text, shown):
    assert without_paths(text) == shown


def test_a_report_says_nothing_of_this_machine():
    command = "hf-subprune prune '/home/alice b/base' --data /home/alice/p.csv --out=/home/alice/out"
    report = without_local(make_report(model="/home/alice b/base", command=command))
    assert report.model == "base"
    assert report.command == "hf-subprune prune base --data p.csv --out=out"
    assert without_local(make_report()) == make_report()
