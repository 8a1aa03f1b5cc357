"""Several experts answer, at once or one after another; the answer with most behind it wins.

Knows nothing of how experts were scored: it takes the plan's order, weights and qualities as given.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from composer.errors import Unsupported
from composer.strategies.extract import make_extractor
from composer.strategies.single import Single, SingleSettings
from composer.strategies.voting.ballots import Pace, Poll
from composer.strategies.voting.counting import Rule, Weights, log_odds
from composer.types import Ask, Choice, Chunk, Plan, Request, Tier, Usage


class VoteSettings(BaseModel):
    """How answers are compared and counted, and who is asked when. The policy's `k` is how many
    are asked at most."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    extractor: str = Field("exact", description="exact, number, choice, literal or regex.")
    pattern: str | None = Field(None, description="Of the regex extractor; its first group counts.")
    weights: Literal["weighted", "majority", "log_odds"] = Field(
        "weighted",
        description="By the plan's weights, one expert one vote, or by the log-odds of each "
        "expert's expected quality, which also gives the answer a probability.",
    )
    options: int = Field(
        10,
        ge=2,
        description="For log_odds: how many answers a question has to choose from, roughly. Wrong "
        "ones are taken to spread evenly over them.",
    )
    early_stop: bool = Field(
        True,
        description="Ask no more, and cancel the calls still running, once they cannot change the "
        "outcome.",
    )
    first: int | None = Field(
        None,
        ge=1,
        description="Experts asked at once, best first; the next are asked only while their "
        "answers may matter. Default: all at once.",
    )
    step: int = Field(1, ge=1, description="After `first`: how many are asked at a time.")
    confidence: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Ask no more once the leading answer is this likely to be right; needs "
        "`weights: log_odds` and `first`.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> VoteSettings:
        make_extractor(self.extractor, self.pattern)
        if self.first is not None and not self.early_stop:
            raise ValueError(
                "`first` asks the others only while they matter, and without `early_stop` all are "
                "asked; drop one of the two"
            )
        if self.confidence is not None:
            if self.weights != "log_odds":
                raise ValueError("`confidence` needs probabilities; add `weights: log_odds`")
            if self.first is None:
                raise ValueError(
                    "with all asked at once, `confidence` has nobody left to spare; add `first`"
                )
        return self


class Vote:
    """A vote over the plan's experts, best first, all at the same time or in waves.

    The winner is the extracted answer; what is emitted is the text of the best-scored expert
    among those that gave it. An expert that fails, or says nothing that can be counted, abstains.
    Calls that cannot change the winner are cut short or not made; then the text is that of the
    best of those that had answered, and calls cut short report no usage, so the sum leaves them
    out. In waves, also stops by what further answers are worth (`counting.Rule`).
    """

    name: ClassVar[str] = "vote"
    tier: ClassVar[Tier] = "supported"
    paper: ClassVar[str] = (
        "Self-Consistency, arXiv:2203.11171; Symbolic-MoE, arXiv:2503.05641; log-odds weights: "
        "Nitzan and Paroush, International Economic Review 23, 1982"
    )
    settings: ClassVar[type[BaseModel]] = VoteSettings

    def __init__(self, settings: VoteSettings) -> None:
        self._settings = settings
        self._extract = make_extractor(settings.extractor, settings.pattern)
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
        choices = plan.choices
        if len(choices) == 1:  # nothing to count, so the stream need not wait for its end
            async with aclosing(self._single.run(request, plan, ask)) as chunks:
                async for chunk in chunks:
                    yield chunk
            return
        rule, settings = self._rule(choices), self._settings
        pace = Pace(settings.first or len(choices), settings.step, settings.early_stop)
        poll = Poll([choice.expert for choice in choices])
        await poll.hold(rule, pace, ask, self._extract)
        rank = rule.winner({rank: ballot.key for rank, ballot in poll.ballots.items()})
        ballot = poll.ballots[rank]
        yield Chunk(
            text=ballot.text,
            logprobs=ballot.logprobs,
            finish_reason=ballot.finish_reason,
            usage=sum((b.usage for b in poll.ballots.values()), Usage()),
            expert=choices[rank].expert,
            details=_details(poll, rule, ballot.key),
        )

    def _rule(self, choices: Sequence[Choice]) -> Rule:
        settings = self._settings
        if settings.weights == "log_odds":
            weights = log_odds(choices, settings.options)
            return Weights(weights, options=settings.options, confidence=settings.confidence or 1.0)
        return Weights([c.weight if settings.weights == "weighted" else 1.0 for c in choices])


def _details(poll: Poll, rule: Rule, key: str | None) -> dict[str, Any]:
    """What the answer's `composer` field says of the vote."""
    probability = rule.probability(poll.keys)
    return {
        "asked": poll.asked,
        "agreed": sum(k == key for k in poll.keys.values()) if key is not None else 0,
        "stopped": poll.stopped,
        **({} if probability is None else {"probability": round(probability, 4)}),
    }
