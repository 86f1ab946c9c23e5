"""A report as files to read: its JSON, a page of HTML and one of Markdown, and plots where matplotlib is."""

import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from .html import to_html
from .loading_code import processor_class
from .plain import code, fenced, inline
from .records import HTML_NAME, PAGE_NAME, PLOT_FOLDER, REPORT_NAME, Record
from .tables import block_table, example_table, markdown_table, refusal_table, summary_table


def save(record: Record, folder: str | Path, *, with_plots: bool = True) -> Path:
    """Write JSON, page and plots into `folder`, made if need be.

    Args:
        record: What is written.
        folder: Where to.
        with_plots: Whether plots are drawn, which takes some seconds.

    Returns:
        Path of `subprune_report.json`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / REPORT_NAME
    path.write_text(json.dumps(record.to_dict(), indent=2, sort_keys=True) + "\n", encoding="utf-8")
    plots = {}
    if with_plots and find_spec("matplotlib"):
        from .plots import save_plots

        plots = save_plots(record, folder / PLOT_FOLDER)
    shown = {title: f"{PLOT_FOLDER}/{plot.name}" for title, plot in plots.items()}
    (folder / PAGE_NAME).write_text(to_markdown(record, shown), encoding="utf-8")
    (folder / HTML_NAME).write_text(to_html(record, processor_class(folder)), encoding="utf-8")
    return path


def to_markdown(record: Record, plots: Mapping[str, str] | None = None) -> str:
    """The page.

    Args:
        record: What is shown.
        plots: Path of an image, as the page is to link it, per title.
    """
    parts = [
        f"# {inline(record.architecture)} pruned, {inline(record.layout)} layout",
        markdown_table(summary_table(record)),
    ]
    parts += [f"![{title}]({path})" for title, path in (plots or {}).items()]
    for data, metric in {metric.data: metric for metric in record.metrics}.items():
        if (examples := example_table([metric])) is not None:
            parts += [f"## {inline(data)}, side by side", markdown_table(examples)]
    parts += ["## Blocks", markdown_table(block_table(record))]
    if record.refusals:
        parts += ["## Left whole", markdown_table(refusal_table(record.refusals))]
    settings = ", ".join(code(f"{name}={value!r}") for name, value in sorted(record.config.items()))
    parts += ["## Settings", settings]
    if record.command:
        parts.append(f"```bash\n{fenced(record.command)}\n```")
    return "\n\n".join(parts) + "\n"
