"""The skills a query asks for, in an LLM's words, as weights over a profile's skills. Knows no
profile but its skills' names, and no engine."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from time import perf_counter
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from composer.routing import keywords
from composer.routing.asking import Asking
from composer.routing.base import Embedder, Query
from composer.types import Ask, FloatArray


class AskedSkillsSettings(BaseModel):
    """Symbolic-MoE's inference: an LLM names a query's skills several times over."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    expert: str = Field(description="Who is asked: an expert that follows instructions.")
    samples: int = Field(
        keywords.SAMPLES,
        ge=1,
        le=20,
        description="Answers, asked for at once; of several, what more than one names is kept.",
    )
    temperature: float = Field(keywords.TEMPERATURE, ge=0, le=2)
    timeout_s: float = Field(
        10.0,
        gt=0,
        description="For all answers together; then embedding infers. Once most are there, the "
        "others have as long again. Batches wait for all.",
    )


LEAST_S = 0.2
"""Between most samples and the last one, where they come fast."""

STRAGGLES = 2.0
"""How many times as long as most of the samples took the others may take: one that hangs is not to
cost the whole timeout, and the rest agree without it."""


class AskedSkills:
    """Each keyword that the samples agree on counts as the skill whose name is nearest to it, by
    cosine."""

    def __init__(
        self,
        settings: AskedSkillsSettings,
        names: Sequence[str],
        vectors: FloatArray,
        embedder: Embedder,
    ) -> None:
        """`vectors` (K, d) are those of the skills' names."""
        self.expert = settings.expert
        self._settings = settings
        self._names = tuple(names)
        self._vectors = vectors
        self._embedder = embedder

    @classmethod
    def build(
        cls, settings: AskedSkillsSettings, names: Sequence[str], embedder: Embedder
    ) -> AskedSkills:
        """Blocks: embeds the names."""
        return cls(settings, names, embedder.encode(list(names)), embedder)

    async def infer(
        self, query: Query, ask: Ask | None
    ) -> tuple[tuple[int, ...], Mapping[str, Any]]:
        """Which skills, by number, none where no usable answer came; and what is to be told."""
        chosen = self._settings
        asking = Asking(ask, chosen.expert, None if query.patient else chosen.timeout_s)
        question = keywords.PROMPT.format(text=query.asked)
        samples = [
            asyncio.ensure_future(
                asking.say(
                    question,
                    max_tokens=keywords.MAX_TOKENS,
                    temperature=chosen.temperature,
                    seed=sample,  # else a server that draws by a fixed seed says the same each time
                )
            )
            for sample in range(chosen.samples)
        ]
        late = await _arrived(samples, patient=query.patient)
        said = [None if one in late else one.result() for one in samples]
        words = keywords.agreed([answer or "" for answer in said])
        missing = dict(Counter(asking.failures + ["late"] * len(late)))
        if not words:
            if not missing or any(said):
                asking.nonsense(" | ".join(filter(None, said)))
            told = asking.told
            return (), {"asked": {**told, "unanswered": missing} if any(said) and missing else told}
        vectors = await asyncio.gather(*(self._embedder.embed(word) for word in words))
        nearest = (np.stack(vectors) @ self._vectors.T).argmax(axis=1)  # (words,)
        skills = tuple(dict.fromkeys(nearest.tolist()))
        named: dict[str, Any] = {
            "keywords": list(words),
            "skills": [self._names[k] for k in skills],
        }
        if missing:
            named["unanswered"] = missing  # and the others were enough: nothing has failed
        told = {name: value for name, value in asking.told.items() if name != "failed"}
        return skills, {"asked": {**told, **named}}


async def _arrived(
    samples: Sequence[asyncio.Future[str | None]], *, patient: bool
) -> set[asyncio.Future[str | None]]:
    """Waits for answers of most of them, for the others as long again (`STRAGGLES`), or where
    `patient` for all; those that did not come are cancelled, and returned."""
    began = perf_counter()
    open_: set[asyncio.Future[str | None]] = set(samples)
    try:
        heard = 0
        while open_ and (patient or heard <= len(samples) // 2):
            done, open_ = await asyncio.wait(open_, return_when=asyncio.FIRST_COMPLETED)
            heard += sum(one.result() is not None for one in done)
        if open_:
            left = (STRAGGLES - 1) * (perf_counter() - began)
            _, open_ = await asyncio.wait(open_, timeout=max(left, LEAST_S))
    finally:
        for one in samples:
            one.cancel()
        await asyncio.gather(*samples, return_exceptions=True)
    return open_
