"""Tables of recorded outcomes: what each model answered to each question, and how long it was.
Knows nothing of engines, time or scores.

A table is a CSV file, gzipped or not, one question a row, with the columns `query` (the text as it
is asked, options included), `answer|MODEL` (empty where none could be read), and where they were
recorded `in_chars` and `out_chars|MODEL` (lengths in characters). Other columns are not read.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import sys
import threading
import zlib
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakValueDictionary

ANSWER = "answer|"
OUT_CHARS = "out_chars|"
IN_CHARS = "in_chars"
QUERY = "query"

_MISSING = -1
_SHOWN = 8


@dataclass(frozen=True, slots=True)
class Recorded:
    """One model's answer to one question; lengths in characters, None where not recorded."""

    answer: str
    in_chars: int | None
    out_chars: int | None


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class OutcomeTable:
    """One file. Read-only, and shared by every server that replays it.

    Questions are told apart by their text with white space collapsed; of those that stand in the
    file more than once the first counts.
    """

    path: Path
    _row: Mapping[bytes, int]
    _in_chars: array[int]
    _answers: Mapping[str, Sequence[str]]
    _out_chars: Mapping[str, array[int]]

    @property
    def models(self) -> tuple[str, ...]:
        """Those whose answers were recorded, in the order of the columns."""
        return tuple(self._answers)

    def __len__(self) -> int:
        """Distinct questions."""
        return len(self._row)

    def find(self, question: str, model: str) -> Recorded | None:
        """None where the question is not in the table. Raises KeyError for an unknown model."""
        answers = self._answers[model]
        row = self._row.get(_key(question))
        if row is None:
            return None
        lengths = self._out_chars.get(model)
        return Recorded(
            answer=answers[row],
            in_chars=_known(self._in_chars[row]),
            out_chars=None if lengths is None else _known(lengths[row]),
        )


_tables: WeakValueDictionary[tuple[Path, int, int], OutcomeTable] = WeakValueDictionary()
_reading = threading.Lock()


def read_table(path: Path) -> OutcomeTable:
    """The table at `path`: the one in memory while any server holds it and the file has not
    changed since, else read anew (blocks: about a second for 7,000 questions of 28 models).

    Raises ValueError ("what is wrong; the remedy") for what is no such table."""
    path = path.resolve()
    with _reading:  # the others wait for the one who reads, and then share it
        try:
            stat = path.stat()
            key = (path, stat.st_mtime_ns, stat.st_size)
            table = _tables.get(key)
            if table is None:
                table = _tables[key] = _read(path)
        except FileNotFoundError as error:
            raise ValueError(f"{path} does not exist; correct `table`") from error
        except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
            raise ValueError(
                f"{path} cannot be read: {error}; it should be CSV in UTF-8, or that gzipped"
            ) from error
        return table


def _read(path: Path) -> OutcomeTable:
    with path.open("rb") as raw:
        zipped = raw.read(2) == b"\x1f\x8b"
    opener = gzip.open if zipped else open
    with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file)
        columns = {name: number for number, name in enumerate(next(rows, []))}
        answer_at = _of_models(columns, ANSWER)
        length_at = _of_models(columns, OUT_CHARS)
        if QUERY not in columns or not answer_at:
            lacking = f"`{QUERY}`" if QUERY not in columns else f"`{ANSWER}MODEL`"
            raise ValueError(
                f"{path} has no column {lacking}; only tables with recorded answers can be replayed"
            )
        query_at, in_at = columns[QUERY], columns.get(IN_CHARS)
        row_of: dict[bytes, int] = {}
        answers: dict[str, list[str]] = {model: [] for model in answer_at}
        in_chars = array("i")
        out_chars = {model: array("i") for model in length_at}
        for row in rows:
            if len(row) != len(columns):
                raise ValueError(
                    f"{path}, line {rows.line_num}: {len(row)} cells under {len(columns)} "
                    "columns; give every row a cell for each, and each column its own name"
                )
            if row_of.setdefault(_key(row[query_at]), len(in_chars)) != len(in_chars):
                continue
            in_cell = "" if in_at is None else row[in_at]
            in_chars.append(_length(in_cell, path, rows.line_num))
            for model, at in answer_at.items():
                answers[model].append(sys.intern(row[at]))
            for model, at in length_at.items():
                out_chars[model].append(_length(row[at], path, rows.line_num))
    if not row_of:
        raise ValueError(f"{path} has no questions; correct `table`")
    return OutcomeTable(path, row_of, in_chars, answers, out_chars)


def _of_models(columns: Mapping[str, int], prefix: str) -> dict[str, int]:
    return {name[len(prefix) :]: at for name, at in columns.items() if name.startswith(prefix)}


def _length(cell: str, path: Path, line: int) -> int:
    if not cell:
        return _MISSING
    if not (cell.isascii() and cell.isdigit()) or len(cell) > 9:
        raise ValueError(
            f"{path}, line {line}: {cell!r} is no length; write characters, or nothing"
        )
    return int(cell)


def _known(length: int) -> int | None:
    return None if length == _MISSING else length


def _key(question: str) -> bytes:
    """A digest instead of the text: the texts of a table are most of its size."""
    collapsed = " ".join(question.split()).encode("utf-8", "surrogatepass")
    return hashlib.blake2b(collapsed, digest_size=16).digest()


def listed(models: Sequence[str]) -> str:
    """A few of the names, for a message."""
    more = f" and {len(models) - _SHOWN} more" if len(models) > _SHOWN else ""
    return ", ".join(models[:_SHOWN]) + more
