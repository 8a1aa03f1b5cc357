"""What routers in shadow would have chosen, and which of them were promoted."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    json = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")
    op.create_table(
        "shadows",
        sa.Column("response_id", sa.Text, primary_key=True),
        sa.Column("policy", sa.Text, nullable=False),
        sa.Column("artefact", sa.Text, nullable=False),
        sa.Column("choice", sa.Text, nullable=False),
        sa.Column("scores", json, nullable=False),
    )
    op.create_index("ix_shadows_policy", "shadows", ["policy", "artefact"])
    op.create_table(
        "promotions",
        sa.Column("policy", sa.Text, primary_key=True),
        sa.Column("artefact", sa.Text, nullable=False),
        sa.Column("created", sa.DateTime(timezone=True), nullable=False),
        sa.Column("estimate", json, nullable=False),
    )
