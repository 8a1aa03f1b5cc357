"""Requests, the feedback on them, and the experts added at run time."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0001"
down_revision = None


def upgrade() -> None:
    time = sa.DateTime(timezone=True)
    json = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")

    op.create_table(
        "requests",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("created", time, nullable=False),
        sa.Column("policy", sa.Text),
        sa.Column("strategy", sa.Text),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("catalog_version", sa.Integer, nullable=False),
        sa.Column("catalog_digest", sa.Text, nullable=False),
        sa.Column("plan", json),
        sa.Column("expert", sa.Text),
        sa.Column("experts", json, nullable=False),
        sa.Column("status", sa.Text, nullable=False),
        sa.Column("error_code", sa.Text),
        sa.Column("decision_ms", sa.Float),
        sa.Column("queue_ms", sa.Float),
        sa.Column("first_token_ms", sa.Float),
        sa.Column("run_ms", sa.Float),
        sa.Column("total_ms", sa.Float),
        sa.Column("calls", json, nullable=False),
        sa.Column("prompt_tokens", sa.Integer, nullable=False),
        sa.Column("completion_tokens", sa.Integer, nullable=False),
        sa.Column("cost_usd", sa.Float),
        sa.Column("stream", sa.Boolean, nullable=False),
        sa.Column("messages", json),
        sa.Column("answer", sa.Text),
        sa.Column("query_embedding", sa.LargeBinary, comment="little-endian float32, (d,)"),
        sa.CheckConstraint("status IN ('ok', 'error', 'cancelled')", name="ck_requests_status"),
    )
    op.create_index("ix_requests_created", "requests", ["created"])
    op.create_index("ix_requests_expert", "requests", ["expert", "created"])
    op.create_index("ix_requests_policy", "requests", ["policy", "created"])

    op.create_table(
        "feedback",
        sa.Column("response_id", sa.Text, sa.ForeignKey("requests.id"), primary_key=True),
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("created", time, nullable=False),
        sa.Column("score", sa.Float, nullable=False),
        sa.Column("comment", sa.Text),
        sa.Column("labels", json),
        sa.CheckConstraint("score >= 0 AND score <= 1", name="ck_feedback_score"),
    )
    op.create_index("ix_feedback_created", "feedback", ["created"])

    op.create_table(
        "experts",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("spec", json, nullable=False),
        sa.Column("created", time, nullable=False),
    )
