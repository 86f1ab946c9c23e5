"""The report as one page of HTML, which loads nothing from elsewhere."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, Template
from markupsafe import Markup

from .families import pruned
from .loading_code import loading_code, settings
from .plain import printable
from .records import HTML_NAME, Change, Record
from .runtimes import runtimes
from .svg import certificate_charts, curve_charts, error_charts, kept_charts
from .tables import calibrated_on, in_words, with_unit

_TEMPLATE = Path(__file__).with_name("page_template.html")


def to_html(record: Record, processor: str | None = None) -> str:
    """The page.

    Args:
        record: What is shown.
        processor: Auto class of what was saved beside the model to make its inputs, if anything was.
    """
    return _template().render(
        record=record,
        calibrated=calibrated_on(record.data),
        costs=_costs(record),
        measured=in_words(record.measured_on) if record.latency else "",
        drift=_drift(record),
        kept=_charts(kept_charts(record)) if pruned(record) else [],
        errors=_charts(error_charts(record)),
        certificates=_charts(certificate_charts(record)),
        curves=_charts(curve_charts(record)),
        loading=loading_code(record, "DIR", processor),
        runtimes=list(runtimes(record, "DIR")),
        made=printable(record.command) or f"report = prune(model, data, PruneConfig({settings(record.config)}))",
        versions=", ".join(f"{name} {version}" for name, version in sorted(record.versions.items())),
        blocks=pruned(record),
    )


@cache
def _template() -> Template:
    return Environment(autoescape=True, trim_blocks=True).from_string(_TEMPLATE.read_text(encoding="utf-8"))


def page_of(report: Path) -> Path:
    """The page that was saved with a report, from its folder or its file.

    Raises:
        FileNotFoundError: there is none.
    """
    page = (report if report.is_dir() else report.parent) / HTML_NAME
    if not page.is_file():
        raise FileNotFoundError(
            f"There is no {page}: the report was saved by an earlier version, or the page was removed. "
            f"`PruneReport.load({str(report)!r}).save(DIR)` writes it."
        )
    return page.resolve()


def _charts(drawn: Sequence[str]) -> list[Markup]:
    """Charts, whose texts are escaped already."""
    return [Markup(one) for one in drawn]


def _costs(record: Record) -> list[dict[str, Any]]:
    named: list[tuple[str, Change | None, str]] = [
        ("Parameters", record.parameters, ""),
        ("MACs a sample", record.macs, ""),
        ("Latency", record.latency, "s"),
    ]
    return [
        {
            "name": name,
            "ratio": f"{change.ratio:.0%}",
            "before": with_unit(change.before, unit),
            "after": with_unit(change.after, unit),
            "width_before": round(60 * change.before / max(change.before, change.after)),
            "width_after": round(60 * change.after / max(change.before, change.after)),
        }
        for name, change, unit in named
        if change is not None
    ]


def _drift(record: Record) -> list[dict[str, str]]:
    intervals = record.intervals
    return [
        {
            "name": name.replace("_", " "),
            "value": f"{value:.4g}",
            "interval": "" if name not in intervals else "{:.4g} to {:.4g}".format(*intervals[name]),
        }
        for name, value in record.drift_figures.items()
    ]
