"""Run by alembic for each command; works on the connection it is handed, and opens none."""

from __future__ import annotations

from alembic import context

from composer.store.tables import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    # Alembic thinks that SQLite has none; with our own BEGIN it has, so all or nothing there too.
    transactional_ddl=True,
)
with context.begin_transaction():
    context.run_migrations()
