"""Foreign exceptions become ours here: the database is away, or it refuses the data. No queries."""

from __future__ import annotations

import sqlalchemy.exc as sa

from composer.errors import ComposerError, StoreError

_DATA_CLASSES = frozenset({"22", "23", "54"})
"""SQLSTATE classes that blame the row: data exception, integrity violation, limit exceeded."""


class DatabaseAway(StoreError):
    """No answer now (refused, hanging, locked, full, mid-failover): worth another try later."""


class RecordRefused(StoreError):
    """The database will never take this row."""


def translate(error: Exception, *, what: str) -> ComposerError:
    """The error of ours that a failed database call amounts to.

    Only what certainly blames the row is RecordRefused. Everything else is DatabaseAway, so that
    the unforeseen (a driver's RuntimeError on a closed transport) costs a retry, not a record.
    """
    if isinstance(error, ComposerError):
        return error
    detail = f"{type(error).__name__}: {_first_line(error)}"
    if _blames_row(error):
        return RecordRefused(f"{what} was refused: {detail}")
    return DatabaseAway(f"{what} failed: {detail}")


def _blames_row(error: Exception) -> bool:
    if isinstance(error, sa.IntegrityError | sa.DataError):
        return True
    if not isinstance(error, sa.StatementError):
        # Drivers raise a bare ValueError for a closed connection, but these only for a value.
        return isinstance(error, OverflowError | UnicodeError)
    below = error.orig
    while below is not None:
        sqlstate = getattr(below, "sqlstate", None)
        if isinstance(sqlstate, str):
            return sqlstate[:2] in _DATA_CLASSES
        if isinstance(below, ValueError | TypeError | OverflowError):  # encoding a parameter
            return True
        below = below.__cause__
    return False


def _first_line(error: Exception) -> str:
    text = str(error.orig if isinstance(error, sa.StatementError) else error)
    return text.strip().split("\n")[0][:300]
