"""Whether a router in shadow is better than the one that serves: from records to the arrays of
`offpolicy.py`. Knows no store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from composer.routing.offpolicy import Comparison, Log, compare
from composer.types import Plan

UNKNOWN = 0.5
"""Expected quality where neither router told one. It moves the variance, not the mean."""


class Judged(Protocol):
    """A decision with its outcome, beside what the shadow would have done."""

    @property
    def plan(self) -> Plan: ...
    @property
    def expert(self) -> str: ...
    @property
    def score(self) -> float: ...
    @property
    def choice(self) -> str: ...
    @property
    def scores(self) -> Mapping[str, float]: ...


def judged(rows: Sequence[Judged], min_quality: float = 0.0, seed: int = 0) -> Comparison | None:
    """The shadow's choices against the best ones of the router that serves, both without exploring,
    on the requests that have feedback: `rows`, the newest first. Decisions whose propensity was not
    logged, or that another expert than the planned one answered, are left out; so are those where
    an expert gave way to one that was loaded or of the session, whatever was drawn then: the
    shadow's choice knows of neither, and the two would not be compared by their scores alone. An
    expert counts as tried where the request was explored on and no rule kept it out. None where
    nothing is left. Raises ValueError for records that cannot be (`offpolicy.Log`)."""
    kept: list[tuple[Judged, Mapping[str, Any]]] = []
    for row in reversed(rows):
        told = row.plan.reasons.get("exploration")
        if told is None or "instead_of" in row.plan.reasons:
            continue
        if row.expert == row.plan.best and len(row.plan.choices) == 1:
            kept.append((row, told))
    if not kept:
        return None
    experts = sorted({e for row, told in kept for e in (row.expert, row.choice, told["greedy"])})
    place = {expert: column for column, expert in enumerate(experts)}
    n, width = len(kept), len(experts)
    new, old = np.zeros((n, width)), np.zeros((n, width))
    model = np.full((n, width), UNKNOWN)
    tried = np.zeros((n, width), np.bool_)
    for i, (row, told) in enumerate(kept):
        new[i, place[row.choice]] = 1.0
        old[i, place[told["greedy"]]] = 1.0
        for source in (row.scores, row.plan.scores):  # the one that serves has the last word
            for expert in source.keys() & place.keys():
                model[i, place[expert]] = source[expert]
        explored = told["propensity"] < 1
        for expert, column in place.items():
            known = row.plan.scores.get(expert, -1.0)
            allowed = explored and (min_quality == 0 or known >= min_quality)
            tried[i, column] = allowed or expert in (told["greedy"], row.expert)
    log = Log(
        np.array([place[row.expert] for row, _ in kept], np.intp),
        np.array([told["propensity"] for _, told in kept], np.float64),
        np.array([row.score for row, _ in kept], np.float64),
    )
    return compare(log, new, old, model, tried, seed=seed)
