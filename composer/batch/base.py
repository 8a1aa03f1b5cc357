"""What a batch is made of for its runner: a line, and whoever knows what lines say.

Knows no wire format: the edge hands its own in as a Codec.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from composer.pipeline import Pipeline, Planned
from composer.types import Request


@dataclass(frozen=True, slots=True)
class Line:
    """One request of an input file, `index` counting its requests from 0; `key` names the key of
    the caller whose it is."""

    index: int
    custom_id: str
    url: str
    body: Mapping[str, Any]
    key: str = ""


@dataclass(frozen=True, slots=True)
class Reply:
    """`body` is JSON, an error's too; `status` is what it would be over HTTP."""

    status: int
    body: bytes


class Asked(Protocol):
    """A line's body, read."""

    @property
    def request(self) -> Request: ...

    async def reply(self, pipeline: Pipeline, planned: Planned | None) -> Reply:
        """The answer. Raises as the pipeline does."""
        ...


class Codec(Protocol):
    """The bodies of lines and of replies, in the format that the callers speak."""

    @property
    def endpoints(self) -> Collection[str]:
        """The urls that a line may name."""
        ...

    def read(self, line: Line, id: str) -> Asked:
        """`id` are 32 hex digits, which the reply's own id ends with. Raises RequestError."""
        ...

    def failed(self, error: Exception, id: str) -> Reply:
        """The error as the caller sees it; its cause is logged where the caller is not told."""
        ...


class Watch(Protocol):
    """Told how a run goes on, for a progress bar. Must neither block nor raise."""

    def planned(self, expert: str) -> None:
        """One more line is known to go to this expert ("" where none can be chosen)."""
        ...

    def answered(self, expert: str, ok: bool) -> None:
        """One more line of this expert has its answer on disk."""
        ...
