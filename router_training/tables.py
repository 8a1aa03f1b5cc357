"""Files become columns: CSV, JSON lines and parquet, the first two gzipped or not.
Knows nothing of outcomes."""

from __future__ import annotations

import csv
import gzip
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import orjson

from router_training.errors import DataError, Problems

LONGEST = 1 << 26
"""Characters of one CSV cell. The csv module's own bound is a long answer's length."""

CSV, JSONL, PARQUET = (".csv", ".csv.gz"), (".jsonl", ".jsonl.gz"), (".parquet",)


@dataclass(frozen=True, slots=True)
class Table:
    """`columns` name → one cell a row, None where there is nothing. `lines` says where in the file
    each row begins, counted from 1; in a parquet file, which has no lines, its row."""

    file: str
    columns: Mapping[str, Sequence[Any]]
    lines: Sequence[int]

    def __len__(self) -> int:
        return len(self.lines)

    def rows(self, chosen: Sequence[int]) -> Table:
        columns = {name: [cells[i] for i in chosen] for name, cells in self.columns.items()}
        return Table(self.file, columns, [self.lines[i] for i in chosen])


def name_of(path: Path) -> str:
    """The table's name: the file's up to its first dot, so `mix10` of `mix10.dev.csv.gz`."""
    return path.name.split(".", 1)[0]


def read_table(path: Path) -> Table:
    """Raises DataError for what cannot be read, or is none of the three formats."""
    readers: dict[tuple[str, ...], Callable[[Path], Table]] = {
        CSV: _read_csv,
        JSONL: _read_jsonl,
        PARQUET: _read_parquet,
    }
    for endings, reader in readers.items():
        if path.name.lower().endswith(endings):
            with _readable(path):
                table = reader(path)
            if not table.lines:
                raise DataError.of(str(path), "there are no rows", "Name another file.")
            return table
    raise DataError.of(
        str(path),
        "the file's ending says no format",
        f"Use one of {', '.join(CSV + JSONL + PARQUET)}.",
    )


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise DataError.of(str(path), "there is no such file", "Correct the path.") from error
    except (OSError, EOFError, zlib.error, csv.Error) as error:
        raise DataError.of(
            str(path), f"the file cannot be read: {error}", "Mend it, or name another."
        ) from error
    except UnicodeDecodeError as error:
        raise DataError.of(str(path), f"not UTF-8: {error}", "Save the file as UTF-8.") from error


def _open(path: Path) -> gzip.GzipFile | BufferedReader:
    with path.open("rb") as raw:
        zipped = raw.read(2) == b"\x1f\x8b"
    return gzip.open(path, "rb") if zipped else path.open("rb")


def _read_csv(path: Path) -> Table:
    problems = Problems(str(path))
    csv.field_size_limit(LONGEST)
    with _open(path) as raw:
        # Line breaks inside quotes are the text's own, so they are left as they are.
        text = (
            line.decode("utf-8-sig" if number == 0 else "utf-8") for number, line in enumerate(raw)
        )
        rows = csv.reader(text)
        header = next(rows, [])
        _check_header(header, problems)
        cells: list[list[str]] = []
        lines: list[int] = []
        begins = rows.line_num + 1
        try:
            for row in rows:
                if len(row) == len(header):
                    cells.append(row)
                    lines.append(begins)
                elif row:  # an empty line is no row
                    problems.add(
                        begins,
                        "",
                        f"{len(row)} cells under {len(header)} columns",
                        "Give every row a cell for each column; quote texts with commas.",
                    )
                begins = rows.line_num + 1
        except csv.Error as error:
            problems.add(begins, "", str(error), "Mend the quoting, or use JSON lines.")
    problems.settle()
    columns = {
        name: [cell if cell else None for cell in column]
        for name, column in zip(header, zip(*cells, strict=True), strict=bool(cells))
    }
    return Table(str(path), columns, lines)


def _check_header(header: Sequence[str], problems: Problems) -> None:
    for name in dict.fromkeys(header):
        if header.count(name) > 1:
            problems.add(1, name, "the column stands there twice", "Give each its own name.")
    problems.settle()


def _read_jsonl(path: Path) -> Table:
    problems = Problems(str(path))
    rows: list[dict[str, Any]] = []
    lines: list[int] = []
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = orjson.loads(line)
            except orjson.JSONDecodeError as error:
                problems.add(number, "", f"not JSON: {error}", "Write one JSON object a line.")
                continue
            if not isinstance(row, dict):
                problems.add(number, "", "not a JSON object", "Write one JSON object a line.")
                continue
            rows.append(row)
            lines.append(number)
    problems.settle()
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: [_cell(row.get(name)) for row in rows] for name in names}
    return Table(str(path), columns, lines)


def _read_parquet(path: Path) -> Table:
    duckdb = parquet_engine(path)
    if not path.exists():  # else the path is read as a pattern
        raise FileNotFoundError(path)
    with duckdb.connect(config=dict(PARQUET_CONFIG)) as connection:
        try:
            found = connection.execute("SELECT * FROM read_parquet(?)", [str(path)])
            names = [column[0] for column in found.description or ()]
            rows = found.fetchall()
        except duckdb.Error as error:
            reason = str(error).splitlines()[0]
            raise DataError.of(
                str(path), f"the file cannot be read: {reason}", "Write it again."
            ) from error
    columns = {name: [_cell(row[i]) for row in rows] for i, name in enumerate(names)}
    return Table(str(path), columns, range(1, len(rows) + 1))


PARQUET_CONFIG: Mapping[str, str | bool | int] = {
    "threads": 1,
    "autoinstall_known_extensions": False,
}


def parquet_engine(path: Path) -> Any:
    """The module duckdb. Raises DataError, naming the file that needs it, where it is missing."""
    try:
        import duckdb  # 24 MB and no dependencies; pyarrow is twice that
    except ImportError as error:
        raise DataError.of(
            str(path),
            "parquet files need the package duckdb",
            "Install it: pip install 'composer[training]'.",
        ) from error
    return duckdb


def _cell(value: Any) -> Any:
    """Nothing is None in every format: an empty text, and the NaN that data frames write."""
    missing = value == "" or (isinstance(value, float) and value != value)
    return None if missing else value
