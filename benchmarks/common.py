"""What every benchmark shares: arguments, a table on the screen and as JSON, progress, and
bootstrap intervals. Knows nothing of what is measured."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"
CONSOLE = Console(stderr=True)

Row = Mapping[str, Any]


def add_arguments(
    parser: argparse.ArgumentParser, *, quick: str | None = "a smaller run, at most a minute"
) -> None:
    """The options that every benchmark has. `quick` is what that option does; None: there is no
    smaller run, nor the option."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the table as JSON")
    if quick is not None:
        parser.add_argument("--quick", action="store_true", help=quick)


def show(rows: Sequence[Row], args: argparse.Namespace, *, title: str) -> None:
    """The table on standard output and, with --json, as a list of flat objects."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    table = Table(title=title)
    for name in columns:
        numeric = all(not isinstance(row.get(name), str) for row in rows)
        table.add_column(name, justify="right" if numeric else "left")
    for row in rows:
        table.add_row(*(_cell(row.get(name)) for name in columns))
    console = Console()
    if not console.is_terminal:  # a log or a file: no column is cut short
        console = Console(width=200)
    console.print(table)
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(list(rows), indent=2) + "\n", encoding="utf-8")


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@contextmanager
def progress(label: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar on standard error; call what it yields once for each of `total` steps."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=CONSOLE) as bar:
        task = bar.add_task(label, total=total)
        yield lambda: bar.advance(task)


def bootstrap(
    values: npt.ArrayLike,
    *,
    statistic: Callable[[npt.NDArray[Any]], float] | None = None,
    groups: npt.ArrayLike | None = None,
    draws: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """95 % percentile interval of a statistic (the mean unless given) of `values` (n, …).

    With `groups` (n,) whole groups are drawn, because values within one are not independent.
    """
    data = np.asarray(values)
    rng = np.random.default_rng(seed)
    if groups is None:
        members = None
        n = len(data)
    else:
        names, number = np.unique(np.asarray(groups), return_inverse=True)
        members = np.split(np.argsort(number, kind="stable"), np.cumsum(np.bincount(number))[:-1])
        n = len(names)
    found = np.empty(draws)
    for draw in range(draws):
        chosen = rng.integers(n, size=n)
        if members is not None:
            chosen = np.concatenate([members[group] for group in chosen])
        sample = data[chosen]
        found[draw] = sample.mean() if statistic is None else statistic(sample)
    low, high = np.nanpercentile(found, [2.5, 97.5])
    return float(low), float(high)
