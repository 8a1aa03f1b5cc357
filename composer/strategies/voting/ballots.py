"""Experts are asked, some at once and the rest when these have answered, until the outcome stands.
Knows no way of counting but through `Rule`."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from composer.errors import ComposerError
from composer.strategies.extract import Extractor
from composer.strategies.voting.counting import Rule
from composer.types import Ask, FinishReason, TokenLogprob, Usage

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Ballot:
    """One expert's whole answer. `key` is its extracted form, None: the expert abstains."""

    text: str
    key: str | None
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: FinishReason | None
    usage: Usage


@dataclass(frozen=True, slots=True)
class Pace:
    """How many are asked at once: the first `first`, then `step` at a time. `early` False:
    nothing but the end of the list ends it."""

    first: int
    step: int
    early: bool


@dataclass(slots=True)
class Poll:
    """What was heard, by rank; experts that failed count as abstaining. `asked` counts calls
    begun, `stopped` says why no more were."""

    experts: Sequence[str]
    ballots: dict[int, Ballot] = field(default_factory=dict)
    errors: dict[int, ComposerError] = field(default_factory=dict)
    asked: int = 0
    stopped: str = "all_asked"

    @property
    def keys(self) -> dict[int, str | None]:
        heard: dict[int, str | None] = dict.fromkeys(self.errors)
        return heard | {rank: ballot.key for rank, ballot in self.ballots.items()}

    async def hold(self, rule: Rule, pace: Pace, ask: Ask, extract: Extractor) -> None:
        """Asks until all have been, or the rule has enough. Between two waves any reason will do;
        within one only that the outcome cannot change, so that the winning answer does not depend
        on who is quick. Raises the best expert's error when none answered. No task outlives it,
        whichever way it is left."""
        n = len(self.experts)
        while self.asked < n:
            begin, self.asked = self.asked, self.asked + (pace.step if self.asked else pace.first)
            self.asked = min(self.asked, n)
            later = self.experts[self.asked : self.asked + pace.step]
            if await self._wave(range(begin, self.asked), later, rule, pace, ask, extract):
                self.stopped = "cannot_change"
                break
            ahead = range(self.asked, n)
            if pace.early and self.ballots and ahead and (why := rule.enough(self.keys, ahead)):
                self.stopped = why
                break
        if not self.ballots:
            raise self.errors[min(self.errors)]

    async def _wave(
        self,
        ranks: range,
        later: Sequence[str],
        rule: Rule,
        pace: Pace,
        ask: Ask,
        extract: Extractor,
    ) -> bool:
        """Whether nobody who has not been heard can change the outcome."""
        experts = self.experts
        tasks = {asyncio.create_task(_ballot(experts[r], later, ask, extract)): r for r in ranks}
        pending = set(tasks)
        try:
            while pending:
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    rank = tasks[task]
                    try:
                        self.ballots[rank] = task.result()
                    except ComposerError as error:
                        self.errors[rank] = error
                        log.warning("%r did not vote: %s", experts[rank], error)
                waiting = [*(tasks[task] for task in pending), *range(self.asked, len(experts))]
                if pace.early and waiting and rule.settled(self.keys, waiting):
                    return True
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return False


async def _ballot(expert: str, later: Sequence[str], ask: Ask, extract: Extractor) -> Ballot:
    text: list[str] = []
    logprobs: list[TokenLogprob] = []
    finish_reason: FinishReason | None = None
    usage = Usage()
    async with aclosing(ask(expert, later=later)) as chunks:
        async for chunk in chunks:
            text.append(chunk.text)
            logprobs.extend(chunk.logprobs)
            finish_reason = chunk.finish_reason or finish_reason
            usage += chunk.usage or Usage()
    answer = "".join(text)
    return Ballot(answer, extract(answer), tuple(logprobs), finish_reason, usage)
