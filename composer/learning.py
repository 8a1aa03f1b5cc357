"""Feedback flows to the routers that learn: read from the store a page at a time, off the answers'
way, and kept there with what was learnt, so that a restart goes on. Knows no concrete router.

    feedback ──► store ──► a page ──► router ──► state and marks, one transaction ──► used

Processes on one database share what is learnt: whoever comes second finds a newer version, takes
that up, and tries again. What fails to be written is not used either.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from composer.errors import Conflict, StoreError
from composer.generations import Generation, Generations
from composer.routing.learners import LearningRouter, Observed
from composer.store import Judged, Lesson, Lessons

log = logging.getLogger(__name__)

EVERY_S = 5.0
"""Between two looks for new feedback."""

PAGE = 200
"""Feedbacks learnt from at once: bounds a transaction, and how long a thread is taken."""

LABEL = "experts"
"""The label of a feedback that says how several experts would have done: {expert id: score}."""


@dataclass(frozen=True, slots=True)
class _Taught:
    """The version that a router stands at."""

    router: LearningRouter
    version: int


class Learning:
    """Used from one event loop. `learnt` counts the feedbacks this process has learnt from."""

    def __init__(
        self,
        lessons: Lessons,
        generations: Generations,
        *,
        every_s: float = EVERY_S,
        page: int = PAGE,
    ) -> None:
        self._lessons = lessons
        self._generations = generations
        self._every_s = every_s
        self._page = page
        self._taught: dict[str, _Taught] = {}
        self.learnt = 0

    async def run(self, stop: asyncio.Event) -> None:
        """Until `stop`. While the database is away nothing is learnt, and nothing is lost."""
        away = False
        while not stop.is_set():
            try:
                while await self.step() == self._page and not stop.is_set():
                    pass
                away = False
            except StoreError as error:
                if not away:
                    log.warning("nothing is learnt from feedback for now: %s", error)
                away = True
            except Exception:  # a fault in one policy's learning must not end it for good
                log.exception("nothing is learnt from feedback for now")
            with suppress(TimeoutError):
                async with asyncio.timeout(self._every_s):
                    await stop.wait()

    async def take_up(self, generation: Generation) -> None:
        """Gives the routers of a generation what was learnt before. Where the database is away
        they begin as their bases, and are given it by the first step that reaches it."""
        if routers := _learning(generation):
            try:
                await self._load(routers)
            except StoreError as error:
                log.warning("what was learnt from feedback is not taken up yet: %s", error)

    def stats(self) -> dict[str, Any]:
        """For /health: `learnt`, and of each policy that learns the outcomes that its router has
        seen (whichever process taught it) and the version it stands at."""
        policies = {
            policy: {"seen": taught.router.learner.seen, "version": taught.version}
            for policy, taught in self._taught.items()
        }
        return {"learnt": self.learnt, "policies": policies}

    async def step(self) -> int:
        """Learns from a page of feedback; returns how many it held. Raises StoreError."""
        if not self._generations.live:
            return 0
        routers = _learning(self._generations.live[-1])
        self._taught = {policy: one for policy, one in self._taught.items() if policy in routers}
        if not routers:
            return 0
        await self._catch_up(routers)
        judged = await self._lessons.waiting(self._page)
        if not judged:
            return 0
        # Before the learning is awaited: where a state is taken up meanwhile, this is a Conflict.
        taught = {policy: one for policy, one in self._taught.items() if policy in routers}
        if {policy: one.router for policy, one in taught.items()} != routers:
            return 0  # a new generation's routers were taken up meanwhile
        learnt, learners = [], {}
        for policy, router in routers.items():
            observed = _observed(router, [one for one in judged if one.policy == policy])
            if not observed:
                continue
            learner = await asyncio.to_thread(router.after, observed)
            learners[policy] = learner
            state = await asyncio.to_thread(router.packed, learner)
            version = taught[policy].version + 1
            learnt.append(Lesson(policy, router.fingerprint, version, state))
        try:
            await self._lessons.keep(learnt, [one.feedback for one in judged])
        except Conflict:
            return 0  # the next step takes up what the other process has learnt
        for lesson in learnt:
            router = routers[lesson.policy]
            router.use(learners[lesson.policy])
            self._taught[lesson.policy] = _Taught(router, lesson.version)
        self.learnt += len(judged)
        return len(judged)

    async def _catch_up(self, routers: Mapping[str, LearningRouter]) -> None:
        """Where a router is new, or another process has learnt meanwhile."""
        versions = await self._lessons.versions(routers)
        behind = {}
        for policy, router in routers.items():
            known = self._taught.get(policy)
            current = known is not None and known.router is router
            if not current or known is None or known.version != versions.get(policy, 0):
                behind[policy] = router
        if behind:
            await self._load(behind)

    async def _load(self, routers: Mapping[str, LearningRouter]) -> None:
        kept = await self._lessons.kept(routers)
        for policy, router in routers.items():
            lesson = kept.get(policy)
            if lesson is not None and lesson.fingerprint == router.fingerprint:
                try:
                    router.use(await asyncio.to_thread(router.unpacked, lesson.state))
                except ValueError:
                    log.exception(
                        "what policy %r has learnt cannot be read; it starts anew", policy
                    )
            elif lesson is not None:
                log.info("policy %r learns in another way than before; it starts anew", policy)
            self._taught[policy] = _Taught(router, lesson.version if lesson else 0)


def _learning(generation: Generation) -> dict[str, LearningRouter]:
    found = {}
    for policy, way in generation.ways.items():
        router: object = way.router
        if isinstance(router, LearningRouter):
            found[policy] = router
    return found


def _observed(router: LearningRouter, judged: Sequence[Judged]) -> list[Observed]:
    """What there is to learn; decisions of before the policy learnt, or in another way, are not."""
    found = []
    for one in judged:
        outcomes = _outcomes(one)
        if one.plan is None or not one.plan.learning or not outcomes:
            continue
        try:
            found.append(router.observed(one.plan.learning, outcomes))
        except ValueError as error:
            log.debug("nothing to learn of %s: %s", one.feedback.response_id, error)
    return found


def _outcomes(judged: Judged) -> dict[str, float]:
    """How the experts did: the one that answered alone as the score says, and those of the label.
    The score of an answer that several made is nobody's in particular."""
    outcomes = {}
    if judged.plan is not None and len(judged.plan.choices) == 1 and judged.expert is not None:
        outcomes[judged.expert] = judged.feedback.score
    named = (judged.feedback.labels or {}).get(LABEL)
    if isinstance(named, Mapping):
        outcomes |= {
            str(expert): float(score)
            for expert, score in named.items()
            if isinstance(score, int | float) and 0 <= score <= 1
        }
    return outcomes
