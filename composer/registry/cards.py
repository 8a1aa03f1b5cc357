"""Model cards, files of examples, and folders of adapters. Reads; decides nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from composer.adapters.cache import FileCache
from composer.adapters.files import CARD, outside
from composer.errors import CatalogError, Problem
from composer.source import Document, parse_yaml

MAX_BYTES = 16_000_000
"""Of a card or a file of examples: more is a mistake."""


def read_card(folder: Path, roots: Sequence[Path], cache: FileCache) -> Document | None:
    """The YAML front matter of the folder's README.md, or None where it has none.

    Its lines are looked up only when one is asked for, by reading it again: a problem is rare,
    and ten thousand cards' lines would fill more memory than all else. Raises CatalogError.
    """
    file = folder / CARD
    if not file.is_file():
        return None
    refusal = outside(file, roots)
    if refusal is not None:
        raise CatalogError([refusal])
    data = cache.get([file], "card", lambda: _parse_card(file).data)
    if data is None:
        return None
    return Document(str(file), data, lambda: _parse_card(file).find_lines())


def _parse_card(file: Path) -> Document:
    lines = _read_text(file).splitlines(keepends=True)
    if not lines or lines[0].strip() != "---":
        return Document(str(file), None)
    ends = (number for number, line in enumerate(lines) if number and line.strip() == "---")
    end = next(ends, None)
    if end is None:
        raise _refusal(file, 1, "the front matter has no end", "Close it with a line `---`.")
    document = parse_yaml("".join(lines[1:end]), str(file), first_line=2)
    if document.data is not None and not isinstance(document.data, dict):
        raise _refusal(file, 2, "the front matter has no keys", "Write `key: value` lines.")
    return document


def read_examples(file: Path, roots: Sequence[Path]) -> tuple[str, ...]:
    """Example queries: one a line, or of a .jsonl file each line's string or its `text`. Empty
    lines are skipped. Raises CatalogError."""
    refusal = outside(file, roots)
    if refusal is not None:
        raise CatalogError([refusal])
    if not file.is_file():
        raise _refusal(file, None, "there is no such file", "Correct the path.")
    examples = []
    for number, line in enumerate(_read_text(file).splitlines(), start=1):
        if not line.strip():
            continue
        examples.append(
            _json_example(file, number, line) if file.suffix == ".jsonl" else line.strip()
        )
    if not examples:
        raise _refusal(file, None, "it holds no example", "Write one query a line.")
    return tuple(examples)


def scan(folder: Path, pattern: str, look: Callable[[Path], None]) -> tuple[list[Path], set[Path]]:
    """Folders that match `pattern` (relative to `folder`, or absolute), sorted, and the folders
    that were searched. `look` is told of each before it is searched, and of those that are not
    there but would lead to a match. Hidden ones are left out unless named."""
    path = Path(pattern)
    start = Path(path.anchor) if path.is_absolute() else folder
    parts = path.parts[1:] if path.is_absolute() else path.parts
    level, searched = [start], set()
    for part in parts:
        if part in ("..", "."):
            level = [parent / part for parent in level]
        elif any(mark in part for mark in "*?["):
            searched.update(level)
            for parent in level:
                look(parent)
            level = [
                child
                for parent in level
                for child in sorted(parent.glob(part))
                if child.is_dir() and (part.startswith(".") or not child.name.startswith("."))
            ]
        else:
            level = [parent / part for parent in level]
            for missing in (child for child in level if not child.is_dir()):
                look(missing)
            level = [child for child in level if child.is_dir()]
    return level, searched


def _json_example(file: Path, number: int, line: str) -> str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _refusal(
            file, number, f"this line is not JSON: {error}", "Write one JSON value a line."
        ) from error
    text = value.get("text") if isinstance(value, dict) else value
    if not isinstance(text, str) or not text.strip():
        remedy = 'Write "a query" or {"text": "a query"}.'
        raise _refusal(file, number, "this line holds no example", remedy)
    return text.strip()


def _read_text(file: Path) -> str:
    try:
        if file.stat().st_size > MAX_BYTES:
            raise _refusal(file, None, f"it is larger than {MAX_BYTES:,} bytes", "Shorten it.")
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeError) as error:
        raise _refusal(
            file, None, f"it cannot be read: {error}", "Save it as UTF-8 text."
        ) from error


def _refusal(file: Path, line: int | None, message: str, remedy: str) -> CatalogError:
    return CatalogError([Problem(str(file), "", message, remedy, line)])
