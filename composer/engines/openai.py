"""Any OpenAI-compatible endpoint, somebody else's: chat and completions over HTTP.

Knows nothing of adapters, nor of starting and stopping servers.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Collection, Sequence
from contextlib import aclosing
from typing import ClassVar, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator

from composer.adapters.lora_config import AdapterFeature
from composer.engines.base import Capacity, Health
from composer.engines.http import Timeouts, UnknownUpstreamModel
from composer.engines.keys import key_from, key_hint
from composer.engines.openai_wire import body_of
from composer.engines.upstream import Upstream
from composer.errors import ComposerError, EngineError, EngineMisconfigured, EngineUnavailable
from composer.types import Ability, Adapter, Call, Chunk, Message, Placement, Sampling, Tier

log = logging.getLogger(__name__)

HEALTH_S = 10.0
"""How long what was seen of a server's health is told again: an endpoint may count requests."""


def base_url(written: str) -> str:
    """An http(s) URL without its last slash. Raises ValueError with the remedy."""
    parts = urlsplit(written)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{written!r} is no http(s) URL; write https://host/v1")
    if parts.username or parts.password:
        raise ValueError("a URL holds no password; name its variable in `api_key_env`")
    if parts.query or parts.fragment:
        raise ValueError(f"{written!r} has a query or fragment; write https://host/v1")
    return written.rstrip("/")


class OpenAISettings(BaseModel):
    """One model of somebody else's endpoint."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: str = Field(description="Its base, such as https://api.openai.com/v1.")
    model: str = Field(description="The model's name there.")
    api_key_env: str | None = Field(
        None, description="The environment variable that holds its API key; default: no key."
    )
    in_flight: int = Field(32, ge=1, le=4096, description="Calls that run there at once.")
    queue: int = Field(256, ge=0, description="Calls waiting before new ones are refused (503).")
    max_tokens_field: Literal["max_tokens", "max_completion_tokens"] = Field(
        "max_tokens", description="What it calls the limit of a chat's answer."
    )
    context_window: int | None = Field(
        None, ge=2, description="Prompt and answer in tokens; default: what the experts say."
    )
    timeouts: Timeouts = Timeouts()

    _url = field_validator("url")(base_url)


class OpenAIEngine:
    """The model of one endpoint. It is always there: nothing is started or stopped."""

    name: ClassVar[str] = "openai"
    tier: ClassVar[Tier] = "supported"
    settings: ClassVar[type[BaseModel]] = OpenAISettings
    honours: ClassVar[frozenset[Ability]] = frozenset({"tools", "json", "vision", "logprobs"})
    adapter_features: ClassVar[frozenset[AdapterFeature]] = frozenset()
    model_field: ClassVar[str | None] = None
    path_fields: ClassVar[tuple[str, ...]] = ()
    program_fields: ClassVar[tuple[str, ...]] = ()
    parameters: ClassVar[frozenset[str]] = frozenset(
        {"frequency_penalty", "presence_penalty", "logit_bias", "reasoning_effort", "verbosity"}
    )

    @classmethod
    def check(cls, settings: OpenAISettings, placement: Placement | None) -> None:
        if placement is not None:
            raise ValueError(
                "somebody else's server cannot be moved off a device; remove `placement`"
            )

    @classmethod
    def check_adapters(cls, settings: OpenAISettings) -> None:
        raise ValueError(
            "takes no adapters; name a server of another engine, or remove the adapter"
        )

    def __init__(
        self, server: str, settings: OpenAISettings, *, placement: Placement | None = None
    ) -> None:
        self._server = server
        self._settings = settings
        self._stopped = True
        self._closed = False
        self._seen: tuple[float, Health] | None = None
        self._upstream = Upstream(
            server,
            lambda: settings.url,
            settings.timeouts,
            key=lambda: key_from(settings.api_key_env, server),
            key_variable=settings.api_key_env,
            in_flight=settings.in_flight,
            tls=settings.url.startswith("https:"),
        )

    @property
    def capacity(self) -> Capacity:
        return Capacity(self._settings.in_flight, self._settings.queue)

    @property
    def external(self) -> bool:
        return True

    async def start(self) -> None:
        if self._closed:
            raise EngineUnavailable(f"server {self._server!r} is closed")
        try:
            await self._look()
        except EngineMisconfigured as error:
            log.error("%s; until then its calls fail", error)
        self._stopped = False

    async def stop(self) -> None:
        """Frees no memory of ours."""
        self._stopped = True
        self._upstream.end_all("was stopped")

    async def prepare(self, adapters: Collection[Adapter]) -> None:
        if adapters:
            raise EngineError(
                f"server {self._server!r} takes no adapters; serve them on an engine that does"
            )

    async def retain(self, adapters: Collection[Adapter]) -> None: ...

    async def run(self, call: Call) -> AsyncGenerator[Chunk, None]:
        if self._stopped:
            raise EngineUnavailable(f"server {self._server!r} is not running")
        body = body_of(call, self._settings.model, max_tokens_field=self._settings.max_tokens_field)
        with self._upstream.flight() as flight:
            try:
                async with aclosing(self._upstream.answer(call, body, flight)) as chunks:
                    async for chunk in chunks:
                        yield chunk
            except UnknownUpstreamModel as error:
                raise EngineError(f"{error}; correct the server's `model` or `url`") from None

    async def count_tokens(self, messages: Sequence[Message], prompt: str | None) -> int:
        """Asks for an answer of one token: the protocol has no other way to count."""
        call = Call(
            id="count",
            expert="",
            server=self._server,
            adapter=None,
            messages=tuple(messages) if prompt is None else (),
            prompt=prompt,
            sampling=Sampling(max_tokens=1),
            context_window=0,
        )
        async with aclosing(self.run(call)) as chunks:
            usages = [chunk.usage async for chunk in chunks if chunk.usage is not None]
        if not usages:
            raise EngineError(f"server {self._server!r} reports no usage, so it cannot count")
        return usages[-1].prompt_tokens

    async def health(self) -> Health:
        if self._closed:
            return Health("failed", "it is closed")
        now = asyncio.get_running_loop().time()
        if self._seen is None or now - self._seen[0] > HEALTH_S:
            try:
                await self._look()
                self._seen = (now, Health("ready"))
            except ComposerError as error:
                self._seen = (now, Health("failed", str(error)))
        return self._seen[1]

    async def close(self) -> None:
        self._closed = True
        self._stopped = True
        await self._upstream.close()

    async def _look(self) -> None:
        """Whether it is there and takes the key. Not every endpoint lists its models: a refusal
        for another reason will do."""
        limit_s = self._settings.timeouts.connect_s * 2
        try:
            reply = await self._upstream.ask("GET", "/models", limit_s=limit_s)
        except EngineMisconfigured:
            raise
        except EngineUnavailable as error:
            raise EngineUnavailable(f"{error}; start it, or correct its `url`") from None
        except EngineError as error:
            raise EngineUnavailable(f"{error}; correct the server's `url`") from None
        if reply.status in (401, 403):
            hint = key_hint(self._settings.api_key_env)
            raise EngineMisconfigured(f"server {self._server!r} answered {reply.status}: {hint}")
