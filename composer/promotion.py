"""Routers in shadow: their choices recorded off the answers' way, and their promotion, which a
restart keeps and one word undoes. Knows no concrete router."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import partial
from typing import Any, Protocol, runtime_checkable

from composer.eligibility import restricted
from composer.errors import ComposerError, Conflict, UnknownModel
from composer.generations import Generations, Way
from composer.outcome import Outcome
from composer.registry import Loaded
from composer.routing import conversation
from composer.routing.aims import aim_of
from composer.routing.base import Query, Router
from composer.routing.choose import choose, most_experts
from composer.routing.judging import judged
from composer.store import Promotion, ShadowChoice, Shadows, shadows
from composer.types import Policy

log = logging.getLogger(__name__)

WAITING = 1000
"""Requests whose choice in shadow is still to be made; more are left out of the comparison."""

Keep = Callable[[], Awaitable[None]]

PAGE = 50
EVERY_S = 1.0


@runtime_checkable
class Shadowed(Protocol):
    """A router beside which another one may run. `artefact` is a digest."""

    artefact: str
    shadow: Any


class Promotions:
    """Used from one event loop. `wanted` are the promotions to be served, by policy; those of
    `passed_over` did not fit the registry when it was last read. `left_out` counts the requests
    since the start, of all policies, whose choice in shadow could not be made or written."""

    def __init__(self, shadows: Shadows, generations: Generations) -> None:
        self._shadows = shadows
        self._generations = generations
        self._waiting: asyncio.Queue[Outcome] = asyncio.Queue(WAITING)
        self.wanted: dict[str, Promotion] = {}
        self.passed_over: frozenset[str] = frozenset()
        self.left_out = 0

    # --- in shadow ---------------------------------------------------------------------------

    def put(self, outcome: Outcome) -> None:
        """Never blocks."""
        plan = outcome.plan
        if plan is None or outcome.status != "ok" or self._router(plan.policy) is None:
            return
        try:
            self._waiting.put_nowait(outcome)
        except asyncio.QueueFull:
            self.left_out += 1

    async def run(self, stop: asyncio.Event) -> None:
        """Until `stop`. What cannot be written while the database is away is left out."""
        while not stop.is_set():
            try:
                while await self.step() and not stop.is_set():
                    pass
            except ComposerError as error:
                log.warning("choices in shadow are left out of the comparison: %s", error)
            except Exception:  # a fault of the shadow must not end it for all requests
                log.exception("choices in shadow are left out of the comparison")
            with suppress(TimeoutError):
                async with asyncio.timeout(EVERY_S):
                    await stop.wait()

    async def step(self) -> int:
        """Scores a page of requests; returns how many it took."""
        outcomes: list[Outcome] = []
        while len(outcomes) < PAGE and not self._waiting.empty():
            outcomes.append(self._waiting.get_nowait())
        found: list[ShadowChoice] = []
        for outcome in outcomes:
            try:
                choice = await self._choice(outcome)
            except Exception as error:  # of this request; the others of the page are kept
                self.left_out += 1
                unforeseen = None if isinstance(error, ComposerError) else error
                message = "the choice in shadow for %s is left out of the comparison: %s"
                log.warning(message, outcome.request.id, error, exc_info=unforeseen)
                continue
            if choice is not None:
                found.append(choice)
        try:
            await self._shadows.add(found)
        except Exception:
            self.left_out += len(found)
            raise
        return len(outcomes)

    async def _choice(self, outcome: Outcome) -> ShadowChoice | None:
        request, plan = outcome.request, outcome.plan
        assert plan is not None
        way, router = self._way(plan.policy), self._router(plan.policy)
        version = self._generations.live[-1].catalog.version if self._generations.live else 0
        if way is None or router is None or version != outcome.catalog_version:
            return None  # another catalog by now, perhaps with another shadow
        shadow: Router = router.shadow
        # As the decision it is compared with: whom the key excludes was not to be chosen.
        request = restricted(request, self._generations.live[-1].catalog)
        query = Query(request.text, request.turns[:-1])
        scores, _ = await conversation.score(shadow, query, way.eligibility.mask(request))
        aim = aim_of(
            way.policy,
            way.cost,
            scores,
            shadow.curve,
            quality=request.quality,
            max_cost=request.max_cost,
            calls=way.strategy.calls(most_experts(way.policy))[1],
        )
        chosen = choose(scores, aim, way.policy, calls=way.strategy.calls)
        artefact = router.shadow.artefact
        return ShadowChoice(request.id, plan.policy, artefact, chosen.best, chosen.scores)

    def _way(self, policy: str) -> Way | None:
        return self._generations.live[-1].ways.get(policy) if self._generations.live else None

    def _router(self, policy: str) -> Shadowed | None:
        """The policy's router, where one runs in its shadow."""
        way = self._way(policy)
        router: object = None if way is None else way.router
        return router if isinstance(router, Shadowed) and router.shadow is not None else None

    # --- promotion ---------------------------------------------------------------------------

    async def read(self) -> None:
        """What was promoted before. Raises StoreError."""
        self.wanted = await self._shadows.promotions()

    def applied(self, loaded: Loaded) -> Loaded:
        """The catalog with promoted artefacts in the places of those that the registry names, which
        run in their shadow then. One whose artefact the registry does not name any more, or which
        has changed on disk, is passed over."""
        policies: dict[str, Policy] = dict(loaded.catalog.policies)
        swapped, passed_over = [], set()
        for promotion in self.wanted.values():
            policy = policies.get(promotion.policy)
            settings = None if policy is None else _promoted(policy, promotion)
            if policy is None or settings is None:
                passed_over.add(promotion.policy)
                log.warning(
                    "the promotion of policy %r does not fit the registry any more, and is "
                    "passed over; undo it, or name its artefact as `shadow` again",
                    promotion.policy,
                )
                continue
            router = replace(policy.router, settings=settings)
            policies[policy.id] = replace(policy, router=router)
            swapped.append(f"{promotion.policy}={promotion.artefact}")
        self.passed_over = frozenset(passed_over)
        if not swapped:
            return loaded
        text = "\n".join([loaded.catalog.digest, *sorted(swapped)])
        digest = f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"
        return replace(loaded, catalog=replace(loaded.catalog, policies=policies, digest=digest))

    @contextmanager
    def changed(self, policy: str, promotion: Promotion | None) -> Iterator[Keep]:
        """`wanted` with this promotion, or without the policy's; as before where the body fails.
        Yields what makes it durable, which raises Conflict where `applied` passed it over."""
        before = self.wanted
        rest = {id_: one for id_, one in before.items() if id_ != policy}
        self.wanted = rest if promotion is None else {**rest, policy: promotion}
        try:
            if promotion is None:
                yield partial(self._shadows.undo, policy)
            else:
                yield partial(self._keep, promotion)
        except BaseException:
            self.wanted = before
            raise

    async def _keep(self, promotion: Promotion) -> None:
        if promotion.policy in self.passed_over:
            raise Conflict(
                f"the registry has changed, and what was to be promoted does not run in the shadow "
                f"of policy {promotion.policy!r} any more; ask again what does"
            )
        await self._shadows.promote(promotion)

    async def status(self, policy: str) -> dict[str, Any]:
        """What is served and what runs in shadow (digests), how the two compare on the newest
        judged requests, the promotion in force, and `left_out`. `always_low` is that of the first
        ones, for a bound that holds at every look needs a series with a fixed start;
        `series_ended`: there are more than those, and it moves no more but by late feedback. Raises
        UnknownModel, Conflict without a shadow, StoreError."""
        way, router = self._way(policy), self._router(policy)
        if way is None:
            raise UnknownModel(f"there is no policy {policy!r}", param="policy")
        if router is None:
            raise Conflict(
                f"no router runs in the shadow of policy {policy!r}; give its router `learned` "
                "a `shadow: {artefact: DIR}`"
            )
        shadow = router.shadow.artefact
        rows = await self._shadows.compared(policy, shadow)
        found = await asyncio.to_thread(judged, rows, way.policy.min_quality)
        ended = len(rows) >= shadows.MOST
        if found is not None and ended:
            rows = await self._shadows.compared(policy, shadow, first=True)
            series = await asyncio.to_thread(judged, rows, way.policy.min_quality)
            found = replace(found, always_low=-1.0 if series is None else series.always_low)
        promotion = self.wanted.get(policy)
        if promotion is not None and promotion.artefact != router.artefact:
            promotion = None  # passed over
        return {
            "policy": policy,
            "artefact": router.artefact,
            "shadow": shadow,
            "better": found is not None and found.better,
            "always_better": found is not None and found.always_better,
            "comparison": None if found is None else asdict(found),
            "series_ended": ended,
            "promotion": None if promotion is None else asdict(promotion),
            "left_out": self.left_out,
        }

    async def promotion_of(self, policy: str, *, any_look: bool = False) -> Promotion:
        """The promotion of what runs in shadow. Raises Conflict where it did not prove better, with
        `any_look` by the bound that holds however often one has asked."""
        status = await self.status(policy)
        if status["promotion"] is not None:
            raise Conflict(f"policy {policy!r} has been promoted already; undo that first")
        if not status["always_better" if any_look else "better"]:
            often = ", however often one looks" if any_look else ""
            remedy = "collect more feedback"
            if any_look and status["series_ended"]:
                often += f" (at the first {shadows.MOST} judged requests, which that bound counts)"
                remedy = "judge by one look, planned beforehand"
            raise Conflict(
                f"the artefact in shadow is not better with 95 % confidence{often}; {remedy}, "
                "or name it as `artefact` if you want it anyway"
            )
        return Promotion(policy, status["shadow"], datetime.now(UTC), status["comparison"])


def _promoted(policy: Policy, promotion: Promotion) -> Any:
    """The settings with artefact and shadow exchanged, where the shadow is what was promoted."""
    _, _, shadow = policy.router.digest.partition("+")
    return policy.router.settings.exchanged if shadow == promotion.artefact else None
