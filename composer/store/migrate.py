"""Brings a database to the newest schema, whatever version it has. Knows no table by name."""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from alembic.util import CommandError

from composer.errors import StoreError

_ADVISORY_LOCK = 0x636F6D706F736572  # "composer": one migration at a time on a PostgreSQL server


def upgrade(connection: sa.Connection) -> None:
    """Runs every migration the database lacks, inside the caller's transaction: all or none.

    Processes that boot together take turns: on PostgreSQL by an advisory lock, on SQLite because
    the caller's transaction must be an immediate one. Raises StoreError when the database is
    newer than this code.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_ADVISORY_LOCK)))
    config = _config()
    config.attributes["connection"] = connection
    try:
        command.upgrade(config, "head")
    except CommandError as error:
        raise StoreError(
            f"the database's schema is not one this version knows ({error}); it was probably "
            f"made by a newer version: run that one, or give another database"
        ) from error


def revisions() -> tuple[str, ...]:
    """Every schema version there is, oldest first."""
    script = ScriptDirectory.from_config(_config())
    return tuple(reversed([revision.revision for revision in script.walk_revisions()]))


def _config() -> Config:
    config = Config()
    # Alembic reads options through ConfigParser, where a percent sign starts an interpolation.
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    return config


_MIGRATIONS = Path(__file__).parent / "migrations"
