"""The survey as JSON, as a Markdown table, and in a sentence."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import transformers

from .survey import KINDS, KindOutcome, Row

HEADS = {"base": "bare models", "main": "models with their main head"}
SYMBOLS = {"exact": "exact", "partly": "exact, some refused", "absent": "none"}


def summary(rows: Sequence[Row]) -> str:
    """Counts in one sentence for each head, with the version of Transformers."""
    heads = dict.fromkeys(row.head for row in rows)
    return " ".join(_counts(head, [row for row in rows if row.head == head]) for head in heads)


def _counts(head: str, rows: Sequence[Row]) -> str:
    run = [row for row in rows if row.kinds]
    parts = []
    for kind in KINDS:
        verdicts = Counter(row.kinds[kind].verdict for row in run if kind in row.kinds)
        having = sum(verdicts.values()) - verdicts["absent"]
        parts.append(
            f"of {having} with {kind} blocks, {verdicts['exact']} shrink exactly and {verdicts['partly']} in part"
        )
    saved = [row for row in run if row.layout]
    reloaded = sum(row.reload == "exact" for row in saved)
    return (
        f"Transformers {transformers.__version__}, {HEADS[head]}: {len(rows)} types, {len(run)} built and run; "
        f"{'; '.join(parts)}; {reloaded} of {len(saved)} pruned models reload exactly; "
        f"silently wrong: {sum(row.silently_wrong for row in rows)}."
    )


def stored_rows(path: Path) -> list[Row]:
    """Rows that an earlier survey with the same Transformers appended to `path` before it was interrupted, if any."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    entries = map(json.loads, lines)
    return [Row.from_dict(entry["row"]) for entry in entries if entry["transformers"] == transformers.__version__]


def append_row(path: Path, row: Row) -> None:
    """Append a row to a file of JSON lines."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"transformers": transformers.__version__, "row": asdict(row)}) + "\n")


def to_json(rows: Sequence[Row]) -> str:
    """All rows, with the version of Transformers."""
    return json.dumps({"transformers": transformers.__version__, "rows": [asdict(row) for row in rows]}, indent=1)


def to_markdown(rows: Sequence[Row]) -> str:
    """The summary, the models that ran as a table, the refusals, and the models that could not be built or run."""
    lines = [summary(rows), "", f"| type | class | {' | '.join(KINDS)} | saved as | reload |"]
    lines.append("| --- " * (len(KINDS) + 4) + "|")
    for row in rows:
        if row.kinds:
            verdicts = [_cell(row, kind) for kind in KINDS]
            cells = [row.model_type, row.architecture, *verdicts, row.layout, row.reload]
            lines.append("| " + " | ".join(_escaped(cell) for cell in cells) + " |")
    refusals: dict[str, list[str]] = {}
    for row in rows:
        for kind, outcome in row.kinds.items():
            for name, reason in outcome.refused.items():
                refusals.setdefault(f"{kind}: {reason}", []).append(f"{row.architecture} `{name}`")
    lines += ["", "Refused:", ""]
    lines += [f"- {reason} ({places[0]}, {len(places)} in all)" for reason, places in refusals.items()]
    lines += ["", "Could not be built or run:", ""]
    lines += [f"- {row.model_type} ({row.head}): {row.problem}" for row in rows if not row.kinds]
    return "\n".join(lines) + "\n"


def _cell(row: Row, kind: str) -> str:
    outcome = row.kinds.get(kind, KindOutcome("absent"))
    count = f" ({outcome.found})" if outcome.found else ""
    return SYMBOLS.get(outcome.verdict, outcome.verdict) + count


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|").replace("\n", " ")
