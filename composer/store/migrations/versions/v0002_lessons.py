"""What routers learnt while serving, and which feedback they have learnt from."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.add_column("feedback", sa.Column("learned", sa.DateTime(timezone=True)))
    op.create_index("ix_feedback_learned", "feedback", ["learned", "created"])
    op.create_table(
        "lessons",
        sa.Column("policy", sa.Text, primary_key=True),
        sa.Column("fingerprint", sa.Text, nullable=False),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("state", sa.LargeBinary, nullable=False),
    )
