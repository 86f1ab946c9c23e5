"""Charts of a report as SVG that stands in a page of HTML: nothing is loaded, and no library draws.

Each is a small panel; the page puts as many beside one another as fit.
"""

import math
from collections.abc import Callable, Sequence
from html import escape

from .families import families, numbers, pruned, spread
from .records import BlockReport, Record

BEFORE, AFTER, UNSEEN, INK, GRID = "#c9ced6", "#2f6db5", "#d1495b", "#4b5563", "#e5e7eb"
_SHOWN_CURVES = 6  # of a family
_MOST_TICKS = 8  # below a panel

Scale = Callable[[float], float]


class Panel:
    """A chart with two axes.

    Args:
        title: Above it.
        width, height: In pixels, where the page has that room; it scales.
        x: `(least, most)` of the axis that lies.
        y: The same of the one that stands.
        logarithmic: Whether the one that stands is.
    """

    left, right, top, bottom = 48, 8, 24, 22

    def __init__(
        self,
        title: str,
        size: tuple[int, int],
        x: tuple[float, float],
        y: tuple[float, float],
        logarithmic: bool = False,
    ) -> None:
        self.title, (self.width, self.height) = title, size
        self._x, self._logarithmic = x, logarithmic
        self._y = (math.log10(y[0]), math.log10(y[1])) if logarithmic else y
        self._parts: list[str] = []

    def x(self, value: float) -> float:
        """Where a value of the lying axis is, in pixels."""
        share = (value - self._x[0]) / (self._x[1] - self._x[0])
        return self.left + share * (self.width - self.left - self.right)

    def y(self, value: float) -> float:
        """Where a value of the standing axis is, in pixels."""
        value = max(math.log10(value) if value > 0 else -math.inf, self._y[0]) if self._logarithmic else value
        share = (value - self._y[0]) / (self._y[1] - self._y[0])
        return self.height - self.bottom - share * (self.height - self.top - self.bottom)

    def bar(self, place: float, value: float, colour: str, said: str) -> None:
        """From the foot of the panel; eight tenths wide."""
        left, right, top = self.x(place - 0.4), self.x(place + 0.4), self.y(value)
        foot = self.y(0.0)
        self._add(
            f'<rect x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" height="{foot - top:.1f}" fill="{colour}">'
            f"<title>{escape(said)}</title></rect>"
        )

    def line(self, points: Sequence[tuple[float, float]], colour: str) -> None:
        path = " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in points)
        self._add(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>')

    def dot(self, place: float, value: float, colour: str, said: str, hollow: bool = False) -> None:
        fill = "#fff" if hollow else colour
        self._add(
            f'<circle cx="{self.x(place):.1f}" cy="{self.y(value):.1f}" r="3.2" fill="{fill}" stroke="{colour}" '
            f'stroke-width="1.6"><title>{escape(said)}</title></circle>'
        )

    def ticks_below(self, ticks: Sequence[tuple[float, str]]) -> None:
        for place, text in ticks:
            self._text(self.x(place), self.height - 7, text, "middle")

    def ticks_beside(self, ticks: Sequence[tuple[float, str]]) -> None:
        """With a line across the panel, behind what is drawn."""
        for value, text in ticks:
            y = self.y(value)
            across = f'x1="{self.left}" x2="{self.width - self.right}" y1="{y:.1f}" y2="{y:.1f}"'
            self._parts.insert(0, f'<line {across} stroke="{GRID}"/>')
            self._text(self.left - 5, y + 4, text, "end")

    def svg(self) -> str:
        """The chart."""
        title = f'<text x="0" y="14" font-weight="600">{escape(self.title)}</text>'
        return (
            f'<svg viewBox="0 0 {self.width} {self.height}" role="img" aria-label="{escape(self.title)}" '
            f'font-size="11" fill="{INK}">{title}{"".join(self._parts)}</svg>'
        )

    def _text(self, x: float, y: float, text: str, anchor: str) -> None:
        self._add(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>')

    def _add(self, part: str) -> None:
        self._parts.append(part)


def kept_charts(record: Record) -> list[str]:
    """Share of the units kept in each block by depth, a panel for each family of blocks."""
    charts = []
    for name, blocks in families(record.blocks).items():
        units = " or ".join(map(str, sorted({block.units_before for block in blocks})))
        panel = Panel(f"{name} ({units} units)", (340, 150), (-0.6, max(len(blocks), 6) - 0.4), (0, 100))
        panel.ticks_beside([(0, "0"), (50, "50%"), (100, "100%")])
        for place, block in enumerate(blocks):
            said = f"{block.name}: {block.units_after} of {block.units_before}"
            panel.bar(place, 100, BEFORE, said)
            panel.bar(place, 100 * block.units_after / block.units_before, AFTER, said)
        panel.ticks_below(_places(blocks))
        charts.append(panel.svg())
    return charts


def error_charts(record: Record) -> list[str]:
    """Relative error of each pruned block by depth, on the rows fitted on and on others."""
    charts = []
    for name, blocks in families(pruned(record)).items():
        most = max(max(block.fitted_error, block.held_out_error) for block in blocks) or 1.0
        panel = Panel(name, (340, 150), (-0.6, max(len(blocks), 6) - 0.4), (0, 1.15 * most))
        panel.ticks_beside([(0, "0"), (most / 2, f"{most / 2:.2g}"), (most, f"{most:.2g}")])
        for place, block in enumerate(blocks):
            panel.dot(place, block.fitted_error, AFTER, f"{block.name}: {block.fitted_error:.4f}")
            panel.dot(place, block.held_out_error, UNSEEN, f"{block.name}: {block.held_out_error:.4f}", hollow=True)
        panel.ticks_below(_places(blocks))
        charts.append(panel.svg())
    return charts


def certificate_charts(record: Record) -> list[str]:
    """What each choice of units reaches at least of what any choice of as many could, by depth."""
    charts = []
    certified = [block for block in pruned(record) if block.guarantee is not None]
    for name, blocks in families(certified).items():
        panel = Panel(name, (340, 150), (-0.6, max(len(blocks), 6) - 0.4), (0, 100))
        panel.ticks_beside([(0, "0"), (50, "50%"), (100, "100%")])
        for place, block in enumerate(blocks):
            share = 100 * (block.guarantee or 0.0)
            panel.bar(place, share, AFTER, f"{block.name}: at least {math.floor(10 * share) / 10}%")
        panel.ticks_below(_places(blocks))
        charts.append(panel.svg())
    return charts


def curve_charts(record: Record) -> list[str]:
    """Relative error of some blocks against their units kept, and what was chosen."""
    charts = []
    for name, blocks in families([block for block in record.blocks if block.curve]).items():
        for block, number in zip(spread(blocks, _SHOWN_CURVES), numbers(spread(blocks, _SHOWN_CURVES)), strict=True):
            charts.append(_curve_chart(f"{name.replace('*', number, 1)}", block))
    return charts


def _curve_chart(title: str, block: BlockReport) -> str:
    chosen = [] if block.units_after == block.units_before else [block.fitted_error, block.held_out_error]
    errors = [error for _, *pair in block.curve for error in pair] + chosen
    least, most = max(min(errors), 1e-5), max(*errors, 1e-4)
    low, high = 10 ** math.floor(math.log10(least)), 10 ** math.ceil(math.log10(most))
    panel = Panel(title, (190, 140), (0, 1.04 * block.units_before), (low, max(high, 10 * low)), logarithmic=True)
    exponents = range(round(math.log10(low)), round(math.log10(max(high, 10 * low))) + 1)
    panel.ticks_beside([(10.0**exponent, f"{10.0**exponent:g}") for exponent in exponents])
    panel.line([(units, fitted) for units, fitted, _ in block.curve], AFTER)
    panel.line([(units, unseen) for units, _, unseen in block.curve], UNSEEN)
    if chosen:
        panel.dot(block.units_after, chosen[0], AFTER, f"chosen: {chosen[0]:.4f}")
        panel.dot(block.units_after, chosen[1], UNSEEN, f"chosen: {chosen[1]:.4f}", hollow=True)
    panel.ticks_below([(units, str(units)) for units in (0, block.units_before // 2, block.units_before)])
    return panel.svg()


def _places(blocks: Sequence[BlockReport]) -> list[tuple[float, str]]:
    """Numbers of blocks below their places, as many as there is room for."""
    named = numbers(blocks)
    return [(place, named[place]) for place in range(0, len(blocks), -(-len(blocks) // _MOST_TICKS))]
