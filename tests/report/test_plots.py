import sys
from dataclasses import replace

import pytest
from PIL import Image
from sample_report import make_block, make_report

from hf_subprune.report.plots import (
    GUARANTEE,
    plot_cost,
    plot_curves,
    plot_error,
    plot_kept,
    plot_tradeoff,
    save_plots,
)
from hf_subprune.report.records import Change

matplotlib = pytest.importorskip("matplotlib")


def lines(axes, label):
    """Points of the lines of an axes that have a label."""
    return [list(zip(*line.get_data(), strict=True)) for line in axes.get_lines() if line.get_label() == label]


def test_every_plot_is_a_readable_image(tmp_path):
    before = dict(matplotlib.rcParams)
    plots = save_plots(make_report(layers=3), tmp_path)
    assert [path.name for path in plots.values()] == ["cost.png", "kept.png", "error.png", "curves.png"]
    for path in plots.values():
        with Image.open(path) as image:
            assert image.width >= 1000 and image.convert("L").getextrema() != (255, 255)
    assert dict(matplotlib.rcParams) == before


def test_curves_are_drawn_only_when_there_are_any(tmp_path):
    without = make_report(blocks=(make_block(curve=()),))
    assert "curves.png" not in {path.name for path in save_plots(without, tmp_path).values()}
    assert list(save_plots(make_report(blocks=()), tmp_path)) == ["Parameters, MACs and latency before and after"]


def test_costs_are_shown_with_units_and_ratios():
    parameters, macs, latency = plot_cost(make_report()).axes
    assert [axes.get_title(loc="left") for axes in (parameters, macs, latency)] == [
        "Parameters: 75%",
        "MACs a sample: 50%",
        "Latency: 75%",
    ]
    assert [bar.get_width() for bar in parameters.patches] == pytest.approx([2e6, 1.5e6])
    assert [bar.get_width() for bar in latency.patches] == pytest.approx([0.04, 0.03])
    assert [text.get_text() for text in latency.texts] == ["40 ms", "30 ms"]
    slow = plot_cost(make_report(latency=Change(2.02, 0.999))).axes[-1]
    assert [text.get_text() for text in slow.texts] == ["2.02 s", "999 ms"]


def test_blocks_of_one_stack_share_a_panel_by_depth():
    blocks = [make_block(f"layer.{i}.mlp", units_after=8 * (i + 1)) for i in range(3)] + [make_block("head.mlp")]
    stack, head = plot_kept(make_report(blocks=tuple(blocks))).axes
    assert stack.get_title(loc="left").startswith("layer.*.mlp") and head.get_title(loc="left").startswith("head.mlp")
    assert [bar.get_height() for bar in stack.patches][3:] == [25.0, 50.0, 75.0]
    assert [label.get_text() for label in stack.get_xticklabels()] == ["0", "1", "2"]


def test_many_layers_do_not_crowd_the_axis():
    (axes,) = plot_kept(make_report(blocks=tuple(make_block(f"layer.{i}.mlp") for i in range(80)))).axes
    ticks = [label.get_text() for label in axes.get_xticklabels()]
    assert len(ticks) <= 16 and ticks[:2] == ["0", "5"]


def test_errors_are_shown_fitted_and_held_out_with_the_guarantee():
    blocks = make_block(), make_block("layer.1.mlp", guarantee=None)
    figure = plot_error(make_report(blocks=blocks))
    (axes,) = figure.axes
    assert lines(axes, "rows fitted on") == [[(0, 0.21), (1, 0.21)]]
    assert lines(axes, "rows held out") == [[(0, 0.3), (1, 0.3)]]
    assert [(text.get_text(), text.xy) for text in axes.texts] == [("≥90%", (0, 0.3))]
    assert figure.legends[0].get_title().get_text() == GUARANTEE
    assert not plot_error(make_report(blocks=blocks[1:])).legends[0].get_title().get_text()


def test_blocks_that_were_left_whole_have_no_error():
    whole = make_block("layer.0.attn", units_after=32, fitted_error=0.0, held_out_error=0.0)
    (axes,) = plot_error(make_report(blocks=(whole, make_block()))).axes
    assert axes.get_title(loc="left") == "layer.*.mlp"


def test_curves_show_the_first_and_the_last_layer_and_the_chosen_size():
    figure = plot_curves(make_report(blocks=tuple(make_block(f"layer.{i}.mlp") for i in range(20))))
    titles = [axes.get_title(loc="center") for axes in figure.axes]
    assert len(titles) == 6 and titles[0] == "0" and titles[-1] == "19"
    assert lines(figure.axes[0], "pruned alone, rows fitted on") == [[(8, 0.9), (16, 0.6), (24, 0.2)]]
    assert lines(figure.axes[0], "pruned alone, rows held out") == [[(8, 0.95), (16, 0.7), (24, 0.28)]]
    assert lines(figure.axes[0], "chosen, rows held out") == [[(24, 0.3)]]


def test_nothing_was_chosen_for_a_block_that_is_whole():
    (axes,) = plot_curves(make_report(blocks=(make_block(units_after=32, fitted_error=0.0),))).axes
    assert lines(axes, "chosen, rows fitted on") == [] and len(lines(axes, "pruned alone, rows fitted on")) == 1


def test_size_against_quality_is_sorted_by_size_with_the_original():
    small = make_report(
        parameters=Change(2e6, 1e6), metrics=(replace(make_report().metrics[0], value=Change(0.9, 0.7)),)
    )
    (axes,) = plot_tradeoff({"ours": [make_report(), small]}).axes
    assert lines(axes, "ours") == [[(1.0, 0.7), (1.5, 0.88)]]
    assert lines(axes, "original") == [[(2.0, 0.9)]]
    (axes,) = plot_tradeoff({"ours": [make_report(), small]}, quality="cosine").axes
    assert lines(axes, "ours") == [[(1.0, 0.97), (1.5, 0.97)]] and lines(axes, "original") == [[(2.0, 1.0)]]


def test_a_quality_that_some_report_lacks_is_refused():
    with pytest.raises(ValueError, match=r"'accuracy'.*cosine, relative_error"):
        plot_tradeoff({"a": [make_report()], "b": [make_report(metrics=())]}, quality="accuracy")
    with pytest.raises(ValueError, match="at least one report"):
        plot_tradeoff({"a": []})


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install hf_subprune\[plots\]"):
        plot_cost(make_report())
