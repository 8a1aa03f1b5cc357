"""The tables as they are now. Knows no queries; how they came to be is in migrations/."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql
from sqlalchemy.types import TypeDecorator


class UtcDateTime(TypeDecorator[datetime]):
    """Aware UTC in Python; `timestamptz` on PostgreSQL, text that sorts by time on SQLite."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError(f"{value.isoformat()} has no time zone; give an aware datetime")
        value = value.astimezone(UTC)
        # SQLite keeps no zone: every text it holds is UTC.
        return value.replace(tzinfo=None) if dialect.name == "sqlite" else value

    def process_result_value(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


def _json() -> sa.types.TypeEngine[Any]:
    binary = postgresql.JSONB(none_as_null=True)
    return sa.JSON(none_as_null=True).with_variant(binary, "postgresql")


metadata = sa.MetaData()

requests = sa.Table(
    "requests",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("created", UtcDateTime, nullable=False),
    sa.Column("policy", sa.Text),
    sa.Column("strategy", sa.Text),
    sa.Column("model", sa.Text, nullable=False),
    sa.Column("catalog_version", sa.Integer, nullable=False),
    sa.Column("catalog_digest", sa.Text, nullable=False),
    sa.Column("plan", _json()),
    # The expert whose answer the caller saw; `experts` are all that answered.
    sa.Column("expert", sa.Text),
    sa.Column("experts", _json(), nullable=False),
    sa.Column("status", sa.Text, nullable=False),
    sa.Column("error_code", sa.Text),
    sa.Column("decision_ms", sa.Float),
    sa.Column("queue_ms", sa.Float),
    sa.Column("first_token_ms", sa.Float),
    sa.Column("run_ms", sa.Float),
    sa.Column("total_ms", sa.Float),
    sa.Column("calls", _json(), nullable=False),
    sa.Column("prompt_tokens", sa.Integer, nullable=False),
    sa.Column("completion_tokens", sa.Integer, nullable=False),
    sa.Column("cost_usd", sa.Float),
    sa.Column("stream", sa.Boolean, nullable=False),
    sa.Column("messages", _json()),
    sa.Column("answer", sa.Text),
    sa.Column("query_embedding", sa.LargeBinary, comment="little-endian float32, (d,)"),
    sa.CheckConstraint("status IN ('ok', 'error', 'cancelled')", name="ck_requests_status"),
    sa.Index("ix_requests_created", "created"),
    sa.Index("ix_requests_expert", "expert", "created"),
    sa.Index("ix_requests_policy", "policy", "created"),
)

feedback = sa.Table(
    "feedback",
    metadata,
    # An id is the client's own, so it is unique among one response's feedbacks only.
    sa.Column("response_id", sa.Text, sa.ForeignKey("requests.id"), primary_key=True),
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("created", UtcDateTime, nullable=False),
    sa.Column("score", sa.Float, nullable=False),
    sa.Column("comment", sa.Text),
    sa.Column("labels", _json()),
    # When a router has learnt from it, or there was nothing in it to learn; NULL: not yet.
    sa.Column("learned", UtcDateTime),
    sa.CheckConstraint("score >= 0 AND score <= 1", name="ck_feedback_score"),
    sa.Index("ix_feedback_created", "created"),
    sa.Index("ix_feedback_learned", "learned", "created"),
)

lessons = sa.Table(
    "lessons",
    metadata,
    sa.Column("policy", sa.Text, primary_key=True),
    # Stands for the settings of the router; a state of another one is no use to it.
    sa.Column("fingerprint", sa.Text, nullable=False),
    # Counts the writes, so that of two processes that learn at once one tries again.
    sa.Column("version", sa.Integer, nullable=False),
    sa.Column("state", sa.LargeBinary, nullable=False),
)

experts = sa.Table(
    "experts",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("spec", _json(), nullable=False),
    sa.Column("created", UtcDateTime, nullable=False),
)

# No foreign key: a choice in shadow may be written before its request's record.
shadows = sa.Table(
    "shadows",
    metadata,
    sa.Column("response_id", sa.Text, primary_key=True),
    sa.Column("policy", sa.Text, nullable=False),
    sa.Column("artefact", sa.Text, nullable=False),
    sa.Column("choice", sa.Text, nullable=False),
    sa.Column("scores", _json(), nullable=False),
    sa.Index("ix_shadows_policy", "policy", "artefact"),
)

promotions = sa.Table(
    "promotions",
    metadata,
    sa.Column("policy", sa.Text, primary_key=True),
    sa.Column("artefact", sa.Text, nullable=False),
    sa.Column("created", UtcDateTime, nullable=False),
    sa.Column("estimate", _json(), nullable=False),
)
