"""The figure of the bench of quality."""

import pytest

from hf_subprune.bench.quality import plot


def row(keep: float, importance: str, variant: str | None, error: float) -> dict:
    changed = {"reweight": variant is not None, "variant": variant or "layer"}
    return {"keep": keep, "importance": importance, "drift": {"relative_error": error}, **changed}


@pytest.fixture
def plotted(monkeypatch, tmp_path):
    """Points of each line by its label, and what is written below them."""
    matplotlib_figure = pytest.importorskip("matplotlib.figure")

    def of(rows):
        figures = []
        monkeypatch.setattr(
            matplotlib_figure.Figure, "savefig", lambda figure, *args, **kwargs: figures.append(figure)
        )
        plot(rows, tmp_path / "quality.png")
        (axes,) = figures[0].axes
        lines = {line.get_label(): list(zip(*line.get_data(orig=True), strict=True)) for line in axes.get_lines()}
        return lines, axes.get_xlabel()

    return of


def test_several_fractions_are_the_axis_and_importances_the_lines(plotted):
    rows = [
        row(0.5, "greedy", "seq", 0.1),
        row(0.5, "weight_norm", None, 0.4),
        row(0.3, "greedy", "seq", 0.2),
        row(0.3, "weight_norm", None, 0.6),
    ]
    lines, below = plotted(rows)
    assert lines == {
        "greedy, seq": [(0.3, 0.2), (0.5, 0.1)],
        "weight_norm, old weights": [(0.3, 0.6), (0.5, 0.4)],
    }
    assert below == "kept fraction"


def test_of_one_fraction_importances_are_side_by_side(plotted):
    rows = [
        row(0.5, importance, variant, error)
        for importance, errors in {"greedy": (0.1, 0.3), "weight_norm": (0.2, 0.4)}.items()
        for variant, error in zip(("asym", None), errors, strict=True)
    ]
    lines, below = plotted(rows)
    assert lines == {
        "asym": [("greedy", 0.1), ("weight\nnorm", 0.2)],
        "old weights": [("greedy", 0.3), ("weight\nnorm", 0.4)],
    }
    assert below == "importance, kept fraction 0.5"
