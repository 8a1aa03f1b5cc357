"""What an engine is: a call in, streamed chunks out."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Collection, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

from pydantic import BaseModel

from composer.adapters.lora_config import AdapterFeature
from composer.types import Ability, Adapter, Call, Chunk, Message, Placement, Tier


@dataclass(frozen=True, slots=True)
class Capacity:
    """Calls a server runs at once, calls that may wait for it before new ones are refused, and
    how many distinct adapters the running ones may use (None: no limit)."""

    in_flight: int
    queue: int
    adapters: int | None = None


@dataclass(frozen=True, slots=True)
class Health:
    """What a server does now: `ready` for calls; `off`, as it should be while others have its
    device; `starting`; or `failed`, with the reason in words that anybody may read. One that has
    failed stays so, while it is tried again, until it is ready."""

    state: Literal["ready", "off", "starting", "failed"]
    reason: str | None = None

    @property
    def ok(self) -> bool:
        return self.state != "failed"


class Engine(Protocol):
    """One server, for as long as its settings stay the same.

    `honours` are the abilities this engine can give an expert, `adapter_features` what it can do
    with adapters beyond plain LoRA, `model_field` the setting that names its weights (None:
    somebody else's), `path_fields` and `program_fields` further settings that name files and
    programs (dotted where they lie deeper), `parameters` the wire fields beyond OpenAI's core
    that it understands. Adapters are known by digest: the same weights are loaded once, whatever
    experts use them.
    """

    name: ClassVar[str]
    tier: ClassVar[Tier]
    settings: ClassVar[type[BaseModel]]
    honours: ClassVar[frozenset[Ability]]
    adapter_features: ClassVar[frozenset[AdapterFeature]]
    model_field: ClassVar[str | None]
    path_fields: ClassVar[tuple[str, ...]]
    program_fields: ClassVar[tuple[str, ...]]
    parameters: ClassVar[frozenset[str]]

    @classmethod
    def check(cls, settings: Any, placement: Placement | None) -> None:
        """Raises ValueError ("what is wrong; the remedy") for settings that do not fit a
        placement, such as somebody else's server that we were to stop. Quick, and pure."""
        ...

    @classmethod
    def check_adapters(cls, settings: Any) -> None:
        """Raises ValueError for a server that takes no adapters ("is …; the remedy", to stand
        behind its name). Quick, and pure."""
        ...

    def __init__(
        self, server: str, settings: Any, *, placement: Placement | None = None
    ) -> None: ...

    @property
    def capacity(self) -> Capacity: ...

    @property
    def external(self) -> bool:
        """Whether somebody else starts and ends it: that it is away is then no fault of the
        registry's, and is waited for."""
        ...

    async def start(self) -> None:
        """Ready to run calls, on the base model and on every adapter prepared so far. At once
        where it is ready; joins a start under way; brings back what was stopped or has died.
        Raises EngineUnavailable with the remedy. Somebody else's server that is there and wants
        another key counts as started: its calls then raise EngineMisconfigured at once."""
        ...

    async def stop(self) -> None:
        """Frees the device's memory; `start` brings it back. Calls that still run end with
        EngineUnavailable. What was prepared is remembered. At once where it is stopped."""
        ...

    async def prepare(self, adapters: Collection[Adapter]) -> None:
        """Loads those not loaded yet; running calls go on. All or nothing: on EngineError
        (EngineFull where there is no room) none of them has been added. On a server that is
        stopped they are loaded at its start."""
        ...

    async def retain(self, adapters: Collection[Adapter]) -> None:
        """Forgets every adapter not named; called when no running call uses them."""
        ...

    def run(self, call: Call) -> AsyncGenerator[Chunk, None]:
        """Streams the answer. Closing the generator cancels the call and frees its place.

        Raises Unsupported for what the engine cannot honour, ContextTooLong when the exact
        token count exceeds the window, EngineUnavailable when the server is gone (so that another
        attempt may succeed once it is back), EngineError when it fails otherwise."""
        ...

    async def count_tokens(self, messages: Sequence[Message], prompt: str | None) -> int:
        """Exact prompt length in tokens, as `run` would count it."""
        ...

    async def health(self) -> Health:
        """What it does now; asked of the server itself where it is up."""
        ...

    async def close(self) -> None:
        """Cancels what runs; safe to call twice."""
        ...
