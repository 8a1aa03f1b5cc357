"""The skills a query asks for, in an LLM's words, as weights over a profile's skills. Knows no
profile but its skills' names, and no engine."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
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
        10.0, gt=0, description="For all answers together; then embedding infers. Batches wait."
    )


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
        said = await asyncio.gather(
            *(
                asking.say(
                    question,
                    max_tokens=keywords.MAX_TOKENS,
                    temperature=chosen.temperature,
                    seed=sample,  # else a server that draws by a fixed seed says the same each time
                )
                for sample in range(chosen.samples)
            )
        )
        words = keywords.agreed([answer or "" for answer in said])
        if not words:
            if asking.failed is None:
                asking.nonsense(" | ".join(filter(None, said)))
            return (), {"asked": asking.told}
        vectors = await asyncio.gather(*(self._embedder.embed(word) for word in words))
        nearest = (np.stack(vectors) @ self._vectors.T).argmax(axis=1)  # (words,)
        skills = tuple(dict.fromkeys(nearest.tolist()))
        named = {"keywords": list(words), "skills": [self._names[k] for k in skills]}
        return skills, {"asked": {**asking.told, **named}}
