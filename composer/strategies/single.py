"""One expert answers; its stream is passed on as it comes."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import ClassVar

from pydantic import BaseModel, ConfigDict

from composer.types import Ask, Chunk, Plan, Request, Tier


class SingleSettings(BaseModel):
    """None yet: there is nothing to choose."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Single:
    """The plan's best expert, alone. Whatever its engine honours (n, logprobs) passes through."""

    name: ClassVar[str] = "single"
    tier: ClassVar[Tier] = "supported"
    paper: ClassVar[str] = ""
    settings: ClassVar[type[BaseModel]] = SingleSettings
    path_fields: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def weighs(cls, settings: SingleSettings) -> None:
        """Its experts weigh as the router says."""

    @classmethod
    def check_experts(cls, settings: SingleSettings, experts: Sequence[str], k: int) -> None:
        """Whoever they are, one of them answers."""

    def __init__(self, settings: SingleSettings) -> None:
        del settings

    def check(self, request: Request) -> None:
        """Refuses nothing: what an expert cannot do is the filter's and the engine's to say."""

    def calls(self, experts: int) -> tuple[int, int]:
        return 1, 1

    async def run(self, request: Request, plan: Plan, ask: Ask) -> AsyncGenerator[Chunk, None]:
        expert = plan.best
        async with aclosing(ask(expert, verbatim=True)) as chunks:
            async for chunk in chunks:
                yield chunk if chunk.expert else dataclasses.replace(chunk, expert=expert)
