"""From a request's outcome to the record that is kept. Knows no database."""

from __future__ import annotations

from composer.outcome import Outcome
from composer.store import Record
from composer.types import FloatArray, Message


def record_of(outcome: Outcome, *, content: bool, embedding: FloatArray | None = None) -> Record:
    """`content`: whether messages, answer and query embedding (d,) may be kept; only settings
    allow it."""
    request, plan = outcome.request, outcome.plan
    assert outcome.status != "running"
    called = outcome.timings.called
    asked: tuple[Message, ...] = ({"role": "user", "content": request.prompt},)
    return Record(
        id=request.id,
        policy=plan.policy if plan else None,
        model=request.model,
        catalog_version=outcome.catalog_version,
        catalog_digest=outcome.catalog_digest,
        status=outcome.status,
        strategy=plan.strategy if plan else None,
        plan=plan,
        experts=tuple(dict.fromkeys([*outcome.experts, *called])),
        error_code=outcome.error,
        timings=outcome.timings,
        usage=outcome.usage,
        cost_usd=outcome.cost_usd,
        stream=request.stream,
        messages=(request.messages or asked) if content else None,
        answer="".join(outcome.text) if content else None,
        query_embedding=embedding if content else None,
    )
