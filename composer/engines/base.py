"""What an engine is: a call in, streamed chunks out."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Collection, Sequence
from typing import Any, ClassVar, Protocol

from pydantic import BaseModel

from composer.adapters.lora_config import AdapterFeature
from composer.types import Ability, Adapter, Call, Chunk, Message, Tier


class Engine(Protocol):
    """One server, for as long as its settings stay the same.

    `honours` are the abilities this engine can give an expert, `adapter_features` what it can do
    with adapters beyond plain LoRA, `model_field` the setting that names its weights (None:
    somebody else's). Adapters are known by digest: the same weights are loaded once, whatever
    experts use them.
    """

    name: ClassVar[str]
    tier: ClassVar[Tier]
    settings: ClassVar[type[BaseModel]]
    honours: ClassVar[frozenset[Ability]]
    adapter_features: ClassVar[frozenset[AdapterFeature]]
    takes_adapters: ClassVar[bool]
    model_field: ClassVar[str | None]

    def __init__(self, server: str, settings: Any) -> None: ...

    @property
    def capacity(self) -> tuple[int, int]:
        """Calls it runs at once, and calls that may wait for it before new ones are refused."""
        ...

    async def start(self) -> None:
        """Ready to run calls on the base model. Raises EngineUnavailable with the remedy."""
        ...

    async def prepare(self, adapters: Collection[Adapter]) -> None:
        """Loads those not loaded yet; running calls go on. All or nothing: on EngineError
        none of them has been added."""
        ...

    async def retain(self, adapters: Collection[Adapter]) -> None:
        """Forgets every adapter not named; called when no running call uses them."""
        ...

    def run(self, call: Call) -> AsyncGenerator[Chunk, None]:
        """Streams the answer. Closing the generator cancels the call and frees its place.

        Raises Unsupported for what the engine cannot honour, ContextTooLong when the exact
        token count exceeds the window, EngineError when the server fails."""
        ...

    async def count_tokens(self, messages: Sequence[Message], prompt: str | None) -> int:
        """Exact prompt length in tokens, as `run` would count it."""
        ...

    async def healthy(self) -> bool: ...

    async def close(self) -> None:
        """Cancels what runs; safe to call twice."""
        ...
