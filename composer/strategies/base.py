"""What a strategy is: a request, a plan and `ask` in, one stream of chunks out."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Any, ClassVar, Protocol

from pydantic import BaseModel

from composer.types import Ask, Chunk, Plan, Request, Tier


class Strategy(Protocol):
    """Built once per policy from its settings; holds no state between requests. `path_fields` are
    the settings that name files."""

    name: ClassVar[str]
    tier: ClassVar[Tier]
    paper: ClassVar[str]
    settings: ClassVar[type[BaseModel]]
    path_fields: ClassVar[tuple[str, ...]]

    @classmethod
    def weighs(cls, settings: Any) -> str | None:
        """The expert whose gate weighs the policy's experts, any of the catalog; None: nobody's."""
        ...

    @classmethod
    def check_experts(cls, settings: Any, experts: Sequence[str], k: int) -> None:
        """Raises ValueError ("what is wrong; the remedy") where files that the settings name are
        missing, or do not fit the policy's experts, of which a plan has at most `k`. Quick:
        `composer check` asks it."""
        ...

    def __init__(self, settings: Any) -> None: ...

    def check(self, request: Request) -> None:
        """Raises Unsupported, before anything runs, for what this strategy cannot honour."""
        ...

    def calls(self, experts: int) -> tuple[int, int]:
        """The fewest calls, if all goes well, and the most, for a plan of so many experts."""
        ...

    def run(self, request: Request, plan: Plan, ask: Ask) -> AsyncGenerator[Chunk, None]:
        """Yields the answer. Closing the generator closes every `ask` it opened. The last
        chunk carries the usage summed over all calls, those that lost included."""
        ...
