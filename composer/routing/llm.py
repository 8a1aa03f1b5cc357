"""Routers that ask an LLM about each query: for the task's instruction, or for the worst expert.
Knows no engine: the LLM is an expert of the catalog, called by `ask`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from composer.routing.asking import Asking
from composer.routing.base import NO_DEMANDS, Demands, Embedder, Query, Scores
from composer.routing.neighbours import NeighboursRouter, NeighboursSettings
from composer.types import Ask, BoolArray, Expert, Tier

MAX_TOKENS = 96
"""Of an instruction."""

NUMBER_TOKENS = 16
CARD_CHARS = 300
"""Of what is said of an expert, in elimination."""

INSTRUCT = """Below is a user's request. Do not answer it. Say in one short sentence that begins \
with a verb which task it sets, in general words: what is to be done, to what kind of input.

Request:
<<<
{text}
>>>

Task:"""

ELIMINATE = """Below are a user's request and the experts that could answer it. Do not answer the \
request. Which one of the experts would answer it worst? Reply with its number alone.

Request:
<<<
{text}
>>>

Experts:
{experts}

Worst expert's number:"""


class LlmSettings(BaseModel):
    """Which expert is asked for what, and the retrieval that it is asked beside."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    expert: str = Field(
        description="Who is asked: an expert that follows instructions, of this policy or not."
    )
    method: Literal["instruction", "elimination"] = Field(
        "instruction",
        description="instruction: it writes what the task is, and experts are found by that. "
        "elimination: it names the worst of the candidates, again and again.",
    )
    candidates: int = Field(
        4,
        ge=2,
        le=20,
        description="elimination: how many of the nearest experts take part. One call less than "
        "that is made, one after the other.",
    )
    timeout_s: float = Field(
        10.0,
        gt=0,
        description="For all of a decision's questions together; then it is made by retrieval. "
        "Batches wait.",
    )
    base: NeighboursSettings = Field(
        NeighboursSettings(), description="The retrieval, as of the router `neighbours`."
    )


class LlmRouter:
    """`instruction`: GLIDER's global step. The LLM writes the task's instruction, whose embedding
    takes the place of the query's in retrieval over the experts' own texts; calibrated as that is.

    `elimination`: IRanker's iterative decoding. Of the candidates, the nearest by retrieval, the
    LLM deletes the worst until one is left. Their qualities are those that retrieval gave, handed
    out anew: the highest to the one that is left, the lowest to the first that went. So the level
    is retrieval's and the order the LLM's; whoever is no candidate stands behind, unmoved.

    Nothing is asked where one expert alone is eligible. Where no usable answer comes,
    the query's own words decide (`instruction`), or who is left is ordered as by retrieval
    (`elimination`). The price is the latency of the calls.
    """

    name: ClassVar[str] = "llm"
    tier: ClassVar[Tier] = "experimental"
    paper: ClassVar[str] = "GLIDER, arXiv 2410.07172; IRanker, arXiv 2506.21638"
    settings: ClassVar[type[BaseModel]] = LlmSettings
    needs_texts: ClassVar[bool] = True
    path_fields: ClassVar[tuple[str, ...]] = ()
    curve: ClassVar[None] = None

    def __init__(
        self, base: NeighboursRouter, cards: tuple[str, ...], settings: LlmSettings
    ) -> None:
        """`cards` (E,) is what the LLM reads of each expert."""
        self.experts = base.experts
        self.asked: str | None = settings.expert
        self._base = base
        self._cards = cards
        self._settings = settings

    @classmethod
    def asks(cls, settings: LlmSettings) -> str:
        return settings.expert

    @classmethod
    def digest(cls, settings: LlmSettings) -> str:
        return ""

    @classmethod
    def check(
        cls, experts: Sequence[Expert], settings: LlmSettings, demands: Demands = NO_DEMANDS
    ) -> None:
        NeighboursRouter.check(experts, settings.base, demands)

    @classmethod
    def build(
        cls, experts: Sequence[Expert], settings: LlmSettings, embedder: Embedder
    ) -> LlmRouter:
        base = NeighboursRouter.build(experts, settings.base, embedder)
        return cls(base, tuple(_card(expert) for expert in experts), settings)

    async def score(self, query: Query, eligible: BoolArray, ask: Ask | None = None) -> Scores:
        chosen = self._settings
        asking = Asking(ask, chosen.expert, None if query.patient else chosen.timeout_s)
        told: dict[str, Any]
        if np.count_nonzero(eligible) <= 1:  # no answer could change who it is
            scores, told = await self._base.score(query, eligible), {}
        elif chosen.method == "instruction":
            instruction = await _instruction(query.asked, asking)
            read = query if instruction is None else dataclasses.replace(query, text=instruction)
            scores = await self._base.score(read, eligible)
            told = {} if instruction is None else {"instruction": instruction}
        else:
            scores = await self._base.score(query, eligible)
            scores, gone = await self._eliminated(query.asked, scores, asking)
            told = {"eliminated": gone}
        told = {"asked": {"method": chosen.method, **asking.told, **told}}
        return dataclasses.replace(scores, told=told)

    async def _eliminated(
        self, text: str, scores: Scores, asking: Asking
    ) -> tuple[Scores, list[str]]:
        """The scores with the candidates' qualities handed out anew, and who went, in order."""
        eligible = np.flatnonzero(~np.isnan(scores.quality))
        by_quality = eligible[np.argsort(-scores.quality[eligible], kind="stable")]
        candidates = by_quality[: self._settings.candidates].tolist()
        left, gone = sorted(candidates), list[int]()  # not in retrieval's order: that is no hint
        while len(left) > 1:
            worst = await self._worst(text, left, asking)
            if worst is None:
                break
            left.remove(worst)
            gone.append(worst)
        order = [one for one in candidates if one in left] + gone[::-1]
        quality, uncertainty = scores.quality.copy(), scores.uncertainty.copy()
        quality[order] = scores.quality[candidates]
        uncertainty[order] = scores.uncertainty[candidates]
        scores = dataclasses.replace(scores, quality=quality, uncertainty=uncertainty)
        return scores, [self.experts[one] for one in gone]

    async def _worst(self, text: str, left: Sequence[int], asking: Asking) -> int | None:
        listed = "\n".join(f"{n}. {self._cards[one]}" for n, one in enumerate(left, 1))
        said = await asking.say(
            ELIMINATE.format(text=text, experts=listed), max_tokens=NUMBER_TOKENS
        )
        if said is None:
            return None
        numbers = [int(number) for number in re.findall(r"\d{1,3}", said)]
        named = [left[n - 1] for n in numbers if 1 <= n <= len(left)]
        if not named:
            asking.nonsense(said)
            return None
        return named[0]


async def _instruction(text: str, asking: Asking) -> str | None:
    """The first line of what is written, without marks around it."""
    said = await asking.say(INSTRUCT.format(text=text), max_tokens=MAX_TOKENS)
    if said is None:
        return None
    line = said.splitlines()[0].strip(" \"'*#`")
    if not any(map(str.isalpha, line)):
        asking.nonsense(said)
        return None
    return line


def _card(expert: Expert) -> str:
    """What it is called and said to do; where nothing is said, what it has been asked."""
    said = expert.description or ", ".join(expert.skills) or "; ".join(expert.examples[:3])
    return " ".join(f"{expert.id}: {said}".split())[:CARD_CHARS]
