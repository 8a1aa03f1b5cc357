"""Records and feedback as table rows, and back. Knows no connection."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import orjson

from composer.store.records import Feedback, Record, clean_text, plan_from_json, to_json
from composer.types import Plan, Timings, Usage


def request_row(record: Record) -> dict[str, Any]:
    """The values of one row of `requests`, every column named."""
    timings = record.timings
    embedding = record.query_embedding
    values = {
        "id": record.id,
        "created": record.created,
        "policy": record.policy,
        "strategy": record.strategy,
        "model": record.model,
        "catalog_version": record.catalog_version,
        "catalog_digest": record.catalog_digest,
        "plan": record.plan,
        "expert": record.experts[0] if record.experts else None,
        "experts": record.experts,
        "status": record.status,
        "error_code": record.error_code,
        "decision_ms": timings.decision_ms,
        "queue_ms": timings.queue_ms,
        "first_token_ms": timings.first_token_ms,
        "run_ms": timings.run_ms,
        "total_ms": timings.total_ms,
        "calls": timings.calls,
        "prompt_tokens": record.usage.prompt_tokens,
        "completion_tokens": record.usage.completion_tokens,
        "cost_usd": record.cost_usd,
        "stream": record.stream,
        "messages": record.messages,
        "answer": record.answer,
        "query_embedding": None if embedding is None else embedding.astype("<f4").tobytes(),
    }
    return _cleaned(values)


def record_of(row: Mapping[str, Any]) -> Record:
    """The inverse of `request_row`."""
    embedding = row["query_embedding"]
    return Record(
        id=row["id"],
        created=row["created"],
        policy=row["policy"],
        strategy=row["strategy"],
        model=row["model"],
        catalog_version=row["catalog_version"],
        catalog_digest=row["catalog_digest"],
        plan=plan_of(row["plan"]),
        experts=tuple(row["experts"]),
        status=row["status"],
        error_code=row["error_code"],
        timings=Timings(
            decision_ms=row["decision_ms"],
            queue_ms=row["queue_ms"],
            first_token_ms=row["first_token_ms"],
            run_ms=row["run_ms"],
            total_ms=row["total_ms"],
            calls=list(row["calls"]),
        ),
        usage=Usage(row["prompt_tokens"], row["completion_tokens"]),
        cost_usd=row["cost_usd"],
        stream=row["stream"],
        messages=None if row["messages"] is None else tuple(row["messages"]),
        answer=row["answer"],
        query_embedding=None if embedding is None else np.frombuffer(embedding, "<f4"),
    )


def plan_of(value: Mapping[str, Any] | None) -> Plan | None:
    """What the column `plan` holds."""
    return None if value is None else plan_from_json(value)


def feedback_row(item: Feedback) -> dict[str, Any]:
    """The values of one row of `feedback`, every column named."""
    values = {
        "response_id": item.response_id,
        "id": item.id,
        "created": item.created,
        "score": item.score,
        "comment": item.comment,
        # As the database will give it back, so that what was sent twice compares equal.
        "labels": None if item.labels is None else orjson.loads(to_json(item.labels)),
    }
    return _cleaned(values)


def feedback_of(row: Mapping[str, Any]) -> Feedback:
    """The inverse of `feedback_row`."""
    return Feedback(
        response_id=row["response_id"],
        id=row["id"],
        created=row["created"],
        score=row["score"],
        comment=row["comment"],
        labels=row["labels"],
    )


def _cleaned(values: dict[str, Any]) -> dict[str, Any]:
    """Texts as PostgreSQL can hold them; JSON columns are cleaned where they become JSON."""
    return {
        name: clean_text(value) if isinstance(value, str) else value
        for name, value in values.items()
    }
