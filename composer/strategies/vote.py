"""Several experts answer, at once or one after another; the answer with most behind it wins.

Knows nothing of how experts were scored: it takes the plan's order, weights and qualities as given.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from composer.errors import Unsupported
from composer.strategies.extract import make_extractor
from composer.strategies.single import Single, SingleSettings
from composer.strategies.voting.ballots import Pace, Poll
from composer.strategies.voting.counting import Rule, Weights, expected, log_odds
from composer.strategies.voting.head import log_odds_of
from composer.strategies.voting.learnt import HeadFile, HeadRule
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
    head: Path | None = Field(
        None,
        description="The file that `router-training votes` wrote. It weighs the answers, says how "
        "likely they are, and how many experts are asked at most if the policy's `k` is larger. "
        "Its probability and number of calls hold where experts come by expected quality alone: "
        "`cost_weight`, aims, `tolerance` and `stay` may change their order.",
    )
    names: Mapping[str, str] = Field(
        {}, description="Expert id → its name in the head's file, where the two differ."
    )
    mean_calls: float | None = Field(
        None,
        ge=1,
        allow_inf_nan=False,
        description="Calls a question on average, as they were on the head's own questions; needs "
        "`head` and `first`.",
    )
    bound: float | None = Field(
        None,
        allow_inf_nan=False,
        description="Instead of `mean_calls`: ask no more where that would raise the probability "
        "of a right answer by less than this. Default: 0.",
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
        if self.head is None:
            for key in ("mean_calls", "bound"):
                if getattr(self, key) is not None:
                    raise ValueError(f"`{key}` is what a trained head keeps to; add `head`")
        elif self.weights != "weighted" or self.confidence is not None:
            raise ValueError("a head weighs the answers itself; drop `weights` and `confidence`")
        elif (self.mean_calls is not None or self.bound is not None) and self.first is None:
            raise ValueError("with all asked at once no call can be spared; add `first`")
        elif self.mean_calls is not None and self.bound is not None:
            raise ValueError("`mean_calls` and `bound` both say when to stop; keep one")
        elif self.mean_calls is not None and self.step > 1:
            raise ValueError(
                "`mean_calls` holds where those after `first` are asked one by one; drop `step`"
            )
        return self


class Vote:
    """A vote over the plan's experts, best first, all at the same time or in waves.

    The winner is the extracted answer; what is emitted is the text of the best-scored expert
    among those that gave it. An expert that fails, or says nothing that can be counted, abstains.
    Calls that cannot change the winner are cut short or not made; then the text is that of the
    best of those that had answered, and calls cut short report no usage, so the sum leaves them
    out. In waves, also stops by what further answers are worth (`counting.Rule`).

    With a `head` (`voting/head.py`) answers are weighed as training found best.
    """

    name: ClassVar[str] = "vote"
    tier: ClassVar[Tier] = "supported"
    paper: ClassVar[str] = (
        "Self-Consistency, arXiv:2203.11171; Symbolic-MoE, arXiv:2503.05641; log-odds weights: "
        "Nitzan and Paroush, International Economic Review 23, 1982. The head is ours"
    )
    settings: ClassVar[type[BaseModel]] = VoteSettings
    path_fields: ClassVar[tuple[str, ...]] = ("head",)

    @classmethod
    def weighs(cls, settings: VoteSettings) -> None:
        """Its experts weigh as the router says."""

    @classmethod
    def check_experts(cls, settings: VoteSettings, experts: Sequence[str], k: int) -> None:
        if settings.head is None:
            return
        file = HeadFile.load(settings.head)
        file.check(experts, settings.names, settings.extractor, settings.pattern)
        _bound(settings, file)
        if settings.mean_calls is not None:
            file.check_most(min(k, len(experts)))

    def __init__(self, settings: VoteSettings) -> None:
        self._settings = settings
        self._head, self._bound = None, 0.0
        if settings.head is not None:
            file = HeadFile.load(settings.head)
            self._head, self._bound = file.head, _bound(settings, file)
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

    def calls(self, experts: int) -> tuple[int, int]:
        most = experts if self._head is None else min(experts, self._head.most)
        return min(self._settings.first or most, most), most

    async def run(self, request: Request, plan: Plan, ask: Ask) -> AsyncGenerator[Chunk, None]:
        choices = plan.choices if self._head is None else plan.choices[: self._head.most]
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
        if self._head is not None:
            return HeadRule(self._head, log_odds_of(np.array(expected(choices))), self._bound)
        if settings.weights == "log_odds":
            weights = log_odds(choices, settings.options)
            return Weights(weights, options=settings.options, confidence=settings.confidence or 1.0)
        return Weights([c.weight if settings.weights == "weighted" else 1.0 for c in choices])


def _bound(settings: VoteSettings, file: HeadFile) -> float:
    if settings.mean_calls is None:
        return settings.bound or 0.0
    return file.bound_for(settings.first or 1, settings.mean_calls)


def _details(poll: Poll, rule: Rule, key: str | None) -> dict[str, Any]:
    """What the answer's `composer` field says of the vote."""
    probability = rule.probability(poll.keys)
    return {
        "asked": poll.asked,
        "agreed": sum(k == key for k in poll.keys.values()) if key is not None else 0,
        "stopped": poll.stopped,
        **({"failed": [poll.experts[r] for r in sorted(poll.errors)]} if poll.errors else {}),
        **({} if probability is None else {"probability": round(probability, 4)}),
    }
