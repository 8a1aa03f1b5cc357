"""Records as the tests need them: plain ones, full ones, and any at all."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
from hypothesis import strategies as st

from composer.store import Record
from composer.types import Choice, Plan, Timings, Usage

NOON = datetime(2026, 1, 2, 12, 0, 0, tzinfo=UTC)


def make_record(id: str, **changes: Any) -> Record:
    fields: dict[str, Any] = {
        "id": id,
        "policy": "auto",
        "model": "auto",
        "catalog_version": 3,
        "catalog_digest": "sha256:0f",
        "status": "ok",
        "strategy": "single",
        "plan": Plan(
            policy="auto",
            strategy="single",
            choices=(Choice("upper", 1.0),),
            calls=("upper",),
            scores={"upper": 0.93, "sort": 0.11},
            reasons={"rule": "best_score", "upper": {"similarity": 0.83, "nearest": "caps"}},
        ),
        "experts": ("upper",),
        "timings": Timings(4.5, 0.25, 21.0, 40.0, 47.5, [{"id": f"{id}/0", "expert": "upper"}]),
        "usage": Usage(12, 3),
        "cost_usd": 0.000125,
        "created": NOON,
    }
    return Record(**(fields | changes))


def full_record(id: str) -> Record:
    """With content, as `log_content` keeps it."""
    return make_record(
        id,
        stream=True,
        messages=({"role": "user", "content": "fox, “grüße”"},),
        answer="FOX",
        query_embedding=np.array([0.6, -0.8, 1e-7], dtype=np.float32),
    )


def failed_record(id: str) -> Record:
    """Ended before there was a plan."""
    return make_record(
        id, policy=None, strategy=None, plan=None, experts=(), status="error",
        error_code="model_not_found", timings=Timings(total_ms=1.5), usage=Usage(), cost_usd=None,
    )  # fmt: skip


_numbers = st.floats(0, 1e6, allow_nan=False)
_texts = st.text(max_size=20)
_json = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | _texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_texts, inner, max_size=3),
    max_leaves=6,
)

records = st.builds(
    Record,
    id=st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=12),
    policy=st.none() | _texts,
    model=_texts,
    catalog_version=st.integers(0, 2**31 - 1),
    catalog_digest=st.text("0123456789abcdef", max_size=8),
    status=st.sampled_from(["ok", "error", "cancelled"]),
    plan=st.none()
    | st.builds(
        Plan,
        policy=_texts,
        strategy=_texts,
        choices=st.lists(st.builds(Choice, _texts, _numbers), max_size=3).map(tuple),
        calls=st.lists(_texts, max_size=3).map(tuple),
        scores=st.dictionaries(_texts, _numbers, max_size=3),
        reasons=st.dictionaries(_texts, _json, max_size=3),
    ),
    experts=st.lists(_texts, max_size=3).map(tuple),
    timings=st.builds(
        Timings, _numbers, _numbers, st.none() | _numbers, _numbers, _numbers, st.just([])
    ),
    usage=st.builds(Usage, st.integers(0, 10**6), st.integers(0, 10**6)),
    cost_usd=st.none() | _numbers,
    stream=st.booleans(),
    answer=st.none() | _texts,
    created=st.datetimes(datetime(2000, 1, 1), datetime(2100, 1, 1), timezones=st.just(UTC)).map(
        lambda t: t + timedelta(0)
    ),
)
