"""Several experts answer at once; the answer with most weight behind it wins.

Knows nothing of how experts were scored: it takes the plan's order and weights as given.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from composer.errors import ComposerError, Unsupported
from composer.strategies.extract import make_extractor
from composer.strategies.single import Single, SingleSettings
from composer.types import (
    Ask,
    Choice,
    Chunk,
    FinishReason,
    Plan,
    Request,
    Tier,
    TokenLogprob,
    Usage,
)

log = logging.getLogger(__name__)


class VoteSettings(BaseModel):
    """How answers are compared and counted."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    extractor: str = Field("exact", description="exact, number, choice or regex.")
    pattern: str | None = Field(None, description="Of the regex extractor; its first group counts.")
    weights: Literal["weighted", "majority"] = Field(
        "weighted", description="By the plan's weights, or one expert one vote."
    )
    early_stop: bool = Field(
        True, description="Cancel the calls still running once they cannot change the outcome."
    )

    @model_validator(mode="after")
    def _extractor_exists(self) -> VoteSettings:
        make_extractor(self.extractor, self.pattern)
        return self


@dataclass(frozen=True, slots=True)
class Ballot:
    """One expert's whole answer. `key` is its extracted form, None: the expert abstains."""

    text: str
    key: str | None
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: FinishReason | None
    usage: Usage


class Vote:
    """Weighted vote over the plan's experts, asked at the same time.

    The winner is the extracted answer; what is emitted is the text of the best-scored expert
    among those that gave it. With `early_stop` the winner is the same, but that expert is the
    best of those that had answered; calls cut short report no usage, so the sum leaves them out.
    """

    name: ClassVar[str] = "vote"
    tier: ClassVar[Tier] = "supported"
    paper: ClassVar[str] = "Self-Consistency, arXiv:2203.11171; Symbolic-MoE, arXiv:2503.05641"
    settings: ClassVar[type[BaseModel]] = VoteSettings

    def __init__(self, settings: VoteSettings) -> None:
        self._extract = make_extractor(settings.extractor, settings.pattern)
        self._weighted = settings.weights == "weighted"
        self._early_stop = settings.early_stop
        self._single = Single(SingleSettings())

    def check(self, request: Request) -> None:
        if request.sampling.n > 1:
            raise Unsupported(
                "a vote gives one answer, so n must be 1; name an expert or a policy with "
                "the strategy `single` for more",
                param="n",
            )
        if "tools" in request.needs:
            raise Unsupported(
                "a vote compares texts, and calls of tools are none; name an expert or a policy "
                "with the strategy `single`",
                param="tools",
            )

    async def run(self, request: Request, plan: Plan, ask: Ask) -> AsyncGenerator[Chunk, None]:
        if len(plan.choices) == 1:  # nothing to count, so the stream need not wait for its end
            async with aclosing(self._single.run(request, plan, ask)) as chunks:
                async for chunk in chunks:
                    yield chunk
            return
        ballots = await self._ballots(plan.choices, ask)
        rank = winner(self._weights(plan.choices), {r: b.key for r, b in ballots.items()})
        ballot = ballots[rank]
        yield Chunk(
            text=ballot.text,
            logprobs=ballot.logprobs,
            finish_reason=ballot.finish_reason,
            usage=sum((b.usage for b in ballots.values()), Usage()),
            expert=plan.choices[rank].expert,
        )

    def _weights(self, choices: Sequence[Choice]) -> list[float]:
        return [c.weight if self._weighted else 1.0 for c in choices]

    async def _ballots(self, choices: Sequence[Choice], ask: Ask) -> dict[int, Ballot]:
        """Answers by the expert's place in the plan. Raises the best expert's error when none
        answered. No task outlives it, whichever way it is left."""
        weights = self._weights(choices)
        ballots: dict[int, Ballot] = {}
        errors: dict[int, ComposerError] = {}
        ranks = {
            asyncio.create_task(self._ballot(choice.expert, ask)): rank
            for rank, choice in enumerate(choices)
        }
        pending = set(ranks)
        try:
            while pending:
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    rank = ranks[task]
                    try:
                        ballots[rank] = task.result()
                    except ComposerError as error:
                        errors[rank] = error
                        log.warning("%r did not vote: %s", choices[rank].expert, error)
                keys = {rank: ballot.key for rank, ballot in ballots.items()}
                if self._early_stop and settled(weights, keys, {ranks[task] for task in pending}):
                    break
        finally:
            for task in ranks:
                task.cancel()
            await asyncio.gather(*ranks, return_exceptions=True)
        if not ballots:
            raise errors[min(errors)]
        return ballots

    async def _ballot(self, expert: str, ask: Ask) -> Ballot:
        text: list[str] = []
        logprobs: list[TokenLogprob] = []
        finish_reason: FinishReason | None = None
        usage = Usage()
        async with aclosing(ask(expert)) as chunks:
            async for chunk in chunks:
                text.append(chunk.text)
                logprobs.extend(chunk.logprobs)
                finish_reason = chunk.finish_reason or finish_reason
                usage += chunk.usage or Usage()
        answer = "".join(text)
        return Ballot(answer, self._extract(answer), tuple(logprobs), finish_reason, usage)


def winner(weights: Sequence[float], keys: Mapping[int, str | None]) -> int:
    """Rank of the expert whose answer is emitted: the best-ranked of the heaviest group.

    `weights[rank]` is an expert's weight, best-scored expert first; `keys` maps the ranks that
    answered (at least one) to their extracted answer. Groups of equal weight: the one that
    holds the better-ranked expert. When all abstained, the best-ranked of them.
    """
    groups = _groups(keys)
    if not groups:
        return min(keys)
    return min(_heaviest(weights, groups))


def settled(
    weights: Sequence[float], keys: Mapping[int, str | None], open_ranks: Collection[int]
) -> bool:
    """Whether the winning answer is the same whatever the experts in `open_ranks` will say.

    The strongest rival is a group (or an answer not seen yet) that all of them join; `fsum`
    is correctly rounded, hence monotone, so comparing rounded sums is safe here.
    """
    groups = _groups(keys)
    if not groups:
        return False
    leader = _heaviest(weights, groups)
    lead = math.fsum(weights[r] for r in leader)
    rivals = [members for members in groups.values() if members is not leader]
    for rival in ([*members, *open_ranks] for members in (*rivals, [])):
        if not rival:
            continue
        reach = math.fsum(weights[r] for r in rival)
        if reach > lead or (reach == lead and min(rival) < min(leader)):
            return False
    return True


def _groups(keys: Mapping[int, str | None]) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = {}
    for rank, key in keys.items():
        if key is not None:
            groups.setdefault(key, []).append(rank)
    return groups


def _heaviest(weights: Sequence[float], groups: Mapping[str, list[int]]) -> list[int]:
    return max(groups.values(), key=lambda g: (math.fsum(weights[r] for r in g), -min(g)))
