"""Text that somebody else chose, as plain text: in a terminal, in Markdown, and without places on this machine."""

import html
import re
import shlex
from dataclasses import replace
from pathlib import PurePath
from typing import Any, TypeVar

from huggingface_hub.utils import HFValidationError, validate_repo_id

from .records import Record

_AnyRecord = TypeVar("_AnyRecord", bound=Record)

# Those that move the cursor, turn text round or have no width; tabs and ends of lines among them.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]")
# What ends code, opens HTML, a heading or a template.
_MARKUP = re.compile(r"[`<]|\{[{%#]|(^|\s)#")
# A path from a root, a home or a folder above, but for its last part.
_FOLDERS = re.compile(
    r"(?<![\w/\\.-])(?:file:/+|~[\w.-]*[\\/]|[A-Za-z]:[\\/]|(?:\.\.[\\/])+|[\\/](?![\\/]))"
    r"(?:[^\\/\s'\",;:=|<>()\[\]{}]*[\\/])*"
)
_ROOTED_WORD = re.compile(r"(--?[\w-]+=|\w+:(?!//))?(file:/|~|[A-Za-z]:[\\/]|\.\.?[\\/]|[\\/])")


def printable(text: str, keep: str = "") -> str:
    """Without characters that do something to a terminal; those to keep apart."""
    return _CONTROL.sub(lambda found: found[0] if found[0] in keep else " ", text)


def inline(text: str) -> str:
    """As one line of Markdown, in which nothing is markup."""
    text = html.escape(" ".join(printable(text).split()), quote=False).replace("&gt;", ">")
    for mark in ("`", "#", "{{", "{%", "]("):
        text = text.replace(mark, "".join(f"&#{ord(sign)};" for sign in mark))
    return text


def code(text: str) -> str:
    """As code within a line of Markdown, where it can be."""
    text = printable(text)
    return inline(text) if _MARKUP.search(text) else f"`{text}`"


def fenced(words: str) -> str:
    """As one line of a block of code: a word that could end it is left out."""
    return " ".join("..." if _MARKUP.search(word) else word for word in printable(words).split(" "))


def identifier(name: str) -> str:
    """A name of Python, as code of an example has it."""
    return re.sub(r"\W", "", name)


def is_repo_id(name: Any) -> bool:
    """Whether something has the form of the name of a repo on the Hub."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def without_paths(text: str) -> str:
    """Paths cut to their last part: the rest says where something lies on this machine, and whose it is."""
    return _FOLDERS.sub("", text)


def without_paths_in_command(command: str) -> str:
    """As `without_paths`, of the words of a command, which may hold blanks."""
    try:
        words = shlex.split(command)
    except ValueError:  # quotes without an end
        return without_paths(command)
    return shlex.join(map(_without_path, words))


def _without_path(word: str) -> str:
    found = _ROOTED_WORD.match(word)
    if found is None:
        return without_paths(word)
    return (found[1] or "") + re.split(r"[\\/]", word.rstrip("\\/"))[-1]


def without_local(report: _AnyRecord) -> _AnyRecord:
    """A report that does not say where anything lies on this machine."""
    model = report.model if is_repo_id(report.model) else PurePath(without_paths(report.model)).name
    cleaned = type(report).from_dict(_cleaned(report.to_dict()))
    return replace(cleaned, model=model, command=without_paths_in_command(report.command))


def _cleaned(value: Any) -> Any:
    if isinstance(value, str):
        return without_paths(value)
    if isinstance(value, dict):
        return {_cleaned(name): _cleaned(one) for name, one in value.items()}
    return [_cleaned(one) for one in value] if isinstance(value, (list, tuple)) else value
