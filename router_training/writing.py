"""Columns become a file: CSV, JSON lines or parquet, the first two gzipped or not. The other way of
`tables.py`; knows nothing of outcomes."""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson

from composer.durable import replace_file
from router_training.errors import DataError
from router_training.tables import CSV, JSONL, PARQUET, PARQUET_CONFIG, parquet_engine

Columns = Mapping[str, Sequence[Any]]
"""Name → one cell a row: text, a number, a list, or None where there is nothing."""


def check_writable(path: Path) -> None:
    """Whether `write_table` can write the format, before there is anything to write. Raises
    DataError."""
    name = path.name.lower()
    if not name.endswith(CSV + JSONL + PARQUET):
        raise DataError.of(
            str(path),
            "the file's ending says no format",
            f"Use one of {', '.join(CSV + JSONL + PARQUET)}.",
        )
    if name.endswith(PARQUET):
        parquet_engine(path)


def write_table(path: Path, columns: Columns) -> None:
    """In the format that the file's ending says. The file is there as a whole or as it was. Raises
    DataError for another ending, OSError where it cannot be written."""
    check_writable(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    name = path.name.lower()
    if name.endswith(PARQUET):
        _write_parquet(path, columns)
        return
    lines = _csv_lines(columns) if name.endswith(CSV) else _json_lines(columns)
    data = "".join(lines).encode("utf-8")
    replace_file(path, [gzip.compress(data, mtime=0) if name.endswith(".gz") else data])


def _csv_lines(columns: Columns) -> Iterator[str]:
    buffer = io.StringIO(newline="")
    # A lone "\r" is quoted only where it is part of the line's own end.
    writer = csv.writer(buffer, lineterminator="\r\n")
    for row in itertools.chain([tuple(columns)], zip(*columns.values(), strict=True)):
        writer.writerow([_in_text(cell) for cell in row])
        yield buffer.getvalue().removesuffix("\r\n") + "\n"
        buffer.seek(0)
        buffer.truncate()


def _in_text(cell: Any) -> Any:
    return orjson.dumps(cell).decode() if isinstance(cell, list | dict) else cell


def _json_lines(columns: Columns) -> Iterator[str]:
    for row in zip(*columns.values(), strict=True):
        some = {name: v for name, v in zip(columns, row, strict=True) if v is not None}
        yield orjson.dumps(some).decode() + "\n"


def _write_parquet(path: Path, columns: Columns) -> None:
    """By way of JSON lines, the types named: guessed, a text such as a date would become one."""
    plain = {name: [_in_text(cell) for cell in cells] for name, cells in columns.items()}
    types = ", ".join(f"{_quoted(name)}: {_quoted(_type(cells))}" for name, cells in plain.items())
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        lines, made = Path(folder) / "rows.jsonl", Path(folder) / "rows.parquet"
        lines.write_text("".join(_json_lines(plain)), encoding="utf-8")
        read = f"read_json({_quoted(str(lines))}, format='newline_delimited', columns={{{types}}})"
        with parquet_engine(path).connect(config=dict(PARQUET_CONFIG)) as connection:
            connection.execute(
                f"COPY (SELECT * FROM {read}) TO {_quoted(str(made))} (FORMAT parquet)"
            )
        replace_file(path, [made.read_bytes()])


def _type(cells: Sequence[Any]) -> str:
    kinds = {type(cell) for cell in cells if cell is not None}
    if kinds and kinds <= {int, float}:
        return "DOUBLE" if float in kinds else "BIGINT"
    return "BOOLEAN" if kinds == {bool} else "VARCHAR"


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
