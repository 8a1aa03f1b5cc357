"""Labelled outcomes from files and from the service's own database, checked. Fits nothing.

One question a row (wide), in CSV, JSON lines or parquet:

    query             the text as it is asked (required)
    score|MODEL       0 to 1, at least one such column; empty where the model was not asked
    cost|MODEL        US dollars of the call; or, with list prices (`prices.py`),
    in_chars, out_chars|MODEL   lengths of prompt and answer in characters
    in_tokens|MODEL, out_tokens|MODEL   the same as counted; where known they go first
    choices           JSON list of answer options, which become part of the text
    query_id, benchmark, category
    group             equal where rows may not be parted; equal questions share one anyway
    split             "train", "dev" …: `read(…, split=…)` takes one of them
    contaminated      1 where the question is to be left out of judging
    gold, answer|MODEL          the right answer and the model's, for votes

or one outcome a row (long): `query`, `expert`, `score`, and of the above `cost`, `in_chars`,
`out_chars`, `in_tokens`, `out_tokens`, `answer` without a model, and the rest as it is. Rows of one
`query_id`, or without ids of one text, are one question; several outcomes of one expert on it are
averaged. Other columns are left alone, with a note. A table of intents (`query`, `intent`) is read
by `intents.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from composer.routing.outcomes import Outcomes
from composer.types import BoolArray
from router_training.cells import columns_of, listed
from router_training.draft import Draft, from_long, from_wide, is_long, is_wide
from router_training.errors import DataError
from router_training.groups import groups_of
from router_training.intents import from_intents, of_intents
from router_training.pricing import prices_for
from router_training.tables import Table, read_table

log = logging.getLogger(__name__)

DATABASES = ("sqlite:", "sqlite+", "postgres:", "postgresql:", "postgresql+")


@dataclass(frozen=True, slots=True, eq=False)
class Answers:
    """What the experts answered, `given` (n, E) and `gold` (n,) texts, None where not recorded."""

    experts: tuple[str, ...]
    gold: tuple[str | None, ...]
    given: npt.NDArray[np.object_]

    def rows(self, chosen: npt.NDArray[np.integer] | BoolArray) -> Answers:
        """Some of the questions, by number or mask."""
        numbers = np.arange(len(self.gold))[chosen]
        return replace(self, gold=tuple(self.gold[i] for i in numbers), given=self.given[numbers])

    def of(self, experts: Sequence[str]) -> Answers:
        """Some of the experts, in the order given. Raises KeyError for one that is not there."""
        place = {expert: column for column, expert in enumerate(self.experts)}
        columns = [place[expert] for expert in experts]
        return replace(self, experts=tuple(experts), given=self.given[:, columns])


@dataclass(frozen=True, slots=True, eq=False)
class Dataset:
    """Outcomes with what else stands beside them, row by row. `answers` is None where none were
    recorded; `contaminated` (n,) marks the questions to be left out of judging; `notes` are
    sentences on what was ignored, averaged or missing."""

    outcomes: Outcomes
    answers: Answers | None
    ids: tuple[str, ...]
    contaminated: BoolArray
    notes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.outcomes)

    def rows(self, chosen: npt.NDArray[np.integer] | BoolArray) -> Dataset:
        """Some of the questions, by number or mask."""
        numbers = np.arange(len(self))[chosen]
        return replace(
            self,
            outcomes=self.outcomes.rows(numbers),
            answers=None if self.answers is None else self.answers.rows(numbers),
            ids=tuple(self.ids[i] for i in numbers),
            contaminated=self.contaminated[numbers],
        )

    def of(self, experts: Sequence[str]) -> Dataset:
        """Some of the experts, in the order given. Raises KeyError for one that is not there."""
        return replace(
            self,
            outcomes=self.outcomes.of(experts),
            answers=None if self.answers is None else self.answers.of(experts),
        )


def read(
    source: str | Path,
    *,
    experts: Sequence[str] | None = None,
    split: str | None = None,
    prices: str | Path | None = None,
) -> Outcomes:
    """The outcomes of `load`; its notes go to the log."""
    data = load(source, experts=experts, split=split, prices=prices)
    for note in data.notes:
        log.info("%s: %s", source, note)
    return data.outcomes


def load(
    source: str | Path,
    *,
    experts: Sequence[str] | None = None,
    split: str | None = None,
    prices: str | Path | None = None,
    intents: Sequence[str] = (),
) -> Dataset:
    """A file, or the URL of the service's database.

    `experts`: only these, in this order. `split`: only rows whose column `split` says so. `prices`:
    a table of list prices; without it `models.csv` beside the file, if there is one. `intents`:
    those that a table of intents may have no query of, and is asked about all the same.
    Raises DataError with all problems found, and StoreError for a database that cannot be read.
    """
    if str(source).startswith(DATABASES):
        from router_training.stored import table_of  # SQLAlchemy is loaded only when it is needed

        table, notes = table_of(str(source))
        table = _of_split(table, split)
        draft = from_long(table, None)
        draft = replace(draft, notes=(*notes, *draft.notes))
    else:
        path = Path(source)
        table = _of_split(read_table(path), split)
        price = prices_for(path, None if prices is None else Path(prices))
        if is_wide(table) and is_long(table):
            raise DataError.of(
                table.file,
                "there are both `score|MODEL` and `expert` columns",
                "Write one question a row, or one outcome a row.",
            )
        if is_wide(table):
            draft = from_wide(table, price)
        elif is_long(table):
            draft = from_long(table, price)
        elif of_intents(table):
            return _intents(table, experts, intents)
        else:
            raise _no_outcomes(table)
    return _dataset(table.file, draft, experts)


def _of_split(table: Table, split: str | None) -> Table:
    if split is None:
        return table
    if "split" not in table.columns:
        raise DataError.of(
            table.file,
            "there is no column split",
            f"Add it, or ask for the whole file. {columns_of(table)}",
        )
    cells = table.columns["split"]
    chosen = [row for row, cell in enumerate(cells) if cell == split]
    if not chosen:
        there = sorted({str(cell) for cell in cells if cell is not None})
        raise DataError.of(
            table.file,
            f"no row is of the split {split!r}",
            f"There are: {listed(there) or 'none'}.",
        )
    return table.rows(chosen)


def _no_outcomes(table: Table) -> DataError:
    remedy = (
        "Write columns `score|MODEL` for one question a row, `expert` and `score` for one outcome "
        "a row, or `query` and `intent` where experts are intents."
    )
    return DataError.of(
        table.file, f"there are no scores among the columns {listed(list(table.columns))}", remedy
    )


def _intents(table: Table, experts: Sequence[str] | None, also: Sequence[str]) -> Dataset:
    outcomes = from_intents(table, experts=experts, also=also)
    ids = table.columns.get("query_id", outcomes.text)
    nothing = np.zeros(len(table), np.bool_)
    outside = int((~outcomes.in_scope).sum())
    notes = (f"{outside} questions are out of scope",) if outside else ()
    return Dataset(
        outcomes, None, tuple("" if id is None else str(id) for id in ids), nothing, notes
    )


def _dataset(file: str, draft: Draft, experts: Sequence[str] | None) -> Dataset:
    outcomes = Outcomes(
        experts=draft.experts,
        text=draft.text,
        quality=draft.quality.astype(np.float32),
        cost=draft.cost.astype(np.float32),
        category=draft.category,
        benchmark=draft.benchmark,
        group=groups_of(draft.text, draft.group),
    )
    recorded = bool((draft.given != None).any())  # noqa: E711  elementwise
    answers = Answers(draft.experts, draft.gold, draft.given) if recorded else None
    data = Dataset(outcomes, answers, draft.ids, draft.contaminated, draft.notes)
    if experts is not None:
        unknown = [expert for expert in experts if expert not in draft.experts]
        if unknown:
            raise DataError.of(
                file,
                f"there are no outcomes of {listed(unknown)}",
                f"There are those of: {listed(draft.experts)}.",
            )
        data = data.of(experts)
    known = data.outcomes.known
    if not known.any():
        raise DataError.of(
            file, "not one outcome is known", "Fill in scores, or name another file."
        )
    return replace(data, notes=(*data.notes, *_gaps(data.outcomes)))


def _gaps(outcomes: Outcomes) -> list[str]:
    """What is missing, so that a null measure is no surprise."""
    known = outcomes.known
    notes = []
    if silent := [
        e for e, column in zip(outcomes.experts, known.T, strict=True) if not column.any()
    ]:
        notes.append(f"no outcome is known of {listed(silent)}")
    if nobody := int((~known.any(axis=1)).sum()):
        notes.append(f"{nobody} questions have no known outcome")
    if missing := int((~known).sum()):
        notes.append(f"{missing} of {known.size} outcomes are missing")
    lacking = np.isnan(outcomes.cost) & known
    if unpriced := [
        e for e, column in zip(outcomes.experts, lacking.T, strict=True) if column.any()
    ]:
        notes.append(f"costs are missing of {listed(unpriced)}")
    return notes
