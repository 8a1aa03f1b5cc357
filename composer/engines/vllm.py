"""A vLLM server as an engine: its calls. Over HTTP alone: vllm is never imported. Knows nothing of
how the server comes to be there."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Collection, Sequence
from contextlib import aclosing
from typing import Any, ClassVar

from pydantic import BaseModel

from composer.adapters.lora_config import AdapterFeature
from composer.engines.adapters import name_of
from composer.engines.base import Capacity, Health
from composer.engines.http import Flight, UnknownUpstreamModel
from composer.engines.openai_wire import body_of
from composer.engines.prompts import budget
from composer.engines.vllm_launch import (
    VllmSettings,
    check_placement,
)
from composer.engines.vllm_server import VllmServer
from composer.errors import EngineError, Unsupported
from composer.types import (
    SAFE_PARAMETERS,
    Ability,
    Adapter,
    Call,
    Chunk,
    Message,
    Placement,
    Tier,
)

log = logging.getLogger(__name__)

_COUNTED = ("tools", "chat_template", "chat_template_kwargs", "add_generation_prompt",
            "continue_final_message", "add_special_tokens", "mm_processor_kwargs")  # fmt: skip
"""What of a call changes its prompt's length, besides its messages."""


class VllmEngine:
    """One vLLM server (0.32's protocol).

    Sleep (`placement.sleep_level`) is experimental: it needs a GPU, and was tested against an
    imitation of the server only. While `placement.sleep_level` is set, vLLM serves /sleep,
    /wake_up and more without asking for a key, so whoever can reach the port on this machine can
    use them.
    """

    name: ClassVar[str] = "vllm"
    tier: ClassVar[Tier] = "supported"
    settings: ClassVar[type[BaseModel]] = VllmSettings
    honours: ClassVar[frozenset[Ability]] = frozenset({"tools", "json", "vision", "logprobs"})
    adapter_features: ClassVar[frozenset[AdapterFeature]] = frozenset()
    model_field: ClassVar[str | None] = "model"
    path_fields: ClassVar[tuple[str, ...]] = ("launch.log",)
    program_fields: ClassVar[tuple[str, ...]] = ("launch.python",)
    parameters: ClassVar[frozenset[str]] = SAFE_PARAMETERS | {
        # drawing tokens
        "allowed_token_ids", "bad_words", "length_penalty", "logprob_token_ids",
        "repetition_detection", "structured_outputs", "thinking_token_budget", "use_beam_search",
        # the prompt
        "add_generation_prompt", "add_special_tokens", "chat_template", "chat_template_kwargs",
        "continue_final_message", "documents", "echo", "media_io_kwargs", "mm_processor_kwargs",
        "truncate_prompt_tokens", "truncation_side",
        # the answer's form
        "include_reasoning", "prompt_logprobs", "return_token_ids", "return_tokens_as_token_ids",
        "stream_interval",
        # the server
        "cache_salt", "priority", "vllm_xargs",
    }  # fmt: skip

    @classmethod
    def check(cls, settings: VllmSettings, placement: Placement | None) -> None:
        check_placement(settings, placement)

    @classmethod
    def check_adapters(cls, settings: VllmSettings) -> None:
        if settings.launch is not None and settings.max_loras is None:
            raise ValueError(
                "is started without adapters; give the server `max_loras`, the adapters in one "
                "batch, or remove the adapter"
            )

    def __init__(
        self, server: str, settings: VllmSettings, *, placement: Placement | None = None
    ) -> None:
        self._settings = settings
        self._server = VllmServer(server, settings, placement)

    @property
    def capacity(self) -> Capacity:
        settings = self._settings
        return Capacity(settings.in_flight, settings.queue, settings.max_loras)

    # --- there or not --------------------------------------------------------------------

    @property
    def external(self) -> bool:
        return self._settings.launch is None

    async def start(self) -> None:
        await self._server.start()

    async def stop(self) -> None:
        await self._server.stop()

    async def close(self) -> None:
        await self._server.close()

    async def health(self) -> Health:
        return await self._server.health()

    # --- adapters ------------------------------------------------------------------------

    async def prepare(self, adapters: Collection[Adapter]) -> None:
        if adapters:
            try:
                self.check_adapters(self._settings)
            except ValueError as error:
                raise EngineError(f"server {self._server.name!r} {error}") from None
        if self._server.running:
            await self._server.adapters.prepare(adapters)
        else:  # on its way, too: what a start does not see is loaded by the first call
            self._server.adapters.remember(adapters)

    async def retain(self, adapters: Collection[Adapter]) -> None:
        await self._server.adapters.retain(adapters)

    # --- calls ---------------------------------------------------------------------------

    async def run(self, call: Call) -> AsyncGenerator[Chunk, None]:
        await self._server.demand_running()
        if not self._settings.remote_images:
            _refuse_remote_images(call.messages)
        async with self._server.call() as flight:
            body = await self._body(call, flight)
            begun = False
            for again in (True, False):
                load = await self._loaded(call, flight)
                try:
                    async with aclosing(self._server.upstream.answer(call, body, flight)) as chunks:
                        async for chunk in chunks:
                            begun = True
                            yield chunk
                    return
                except UnknownUpstreamModel as error:
                    if call.adapter is None:
                        raise EngineError(f"{error}; correct the server's `served_name`") from None
                    self._server.adapters.forget(call.adapter, load)
                    if begun or not again:
                        raise
                    log.warning(
                        "server %r has forgotten an adapter: it is loaded again", self._server.name
                    )

    async def count_tokens(self, messages: Sequence[Message], prompt: str | None) -> int:
        await self._server.demand_running()
        async with self._server.call() as flight:
            return await self._count(messages, prompt, {}, flight)

    async def _loaded(self, call: Call, flight: Flight) -> object:
        if call.adapter is None:
            return None
        limit_s = self._settings.timeouts.first_token_s
        until = asyncio.get_running_loop().time() + limit_s
        phase = f"no adapter in {limit_s:g} s (first_token_s)"
        return await flight.wait(self._server.adapters.ready(call.adapter), until, phase)

    async def _body(self, call: Call, flight: Flight) -> dict[str, Any]:
        """Temperature and top_p are sent where nobody gave them: vLLM's own default is the model
        maker's."""
        model = self._server.model if call.adapter is None else name_of(call.adapter)
        body = {"temperature": 1.0, "top_p": 1.0} | body_of(call, model)
        if self._must_count(call):
            count = await self._count(call.messages, call.prompt, call.extra, flight)
            body["max_tokens"] = budget(call, count, self._server.window or call.context_window)
        return body

    def _must_count(self, call: Call) -> bool:
        """vLLM (0.32) refuses a prompt that exceeds its own window, and silently cuts `max_tokens`
        to the room there is. So what a caller asked for, and an expert's smaller window, are ours
        to hold; but only where the text could be too long at all, every byte being a token at
        most. (And a completion without a limit would get 16 tokens.)"""
        limit = call.sampling.max_tokens
        if limit is None and call.prompt is not None:
            return True
        own = self._server.window
        asked = call.max_tokens_asked and limit is not None
        if not asked and own is not None and call.context_window >= own:
            return False
        window = call.context_window if own is None else min(own, call.context_window)
        texts = [call.prompt] if call.prompt is not None else [str(m) for m in call.messages]
        texts.append(str(call.extra.get("tools", "")))
        return sum(len(text.encode()) for text in texts) + (limit or 0) > window

    async def _count(
        self,
        messages: Sequence[Message],
        prompt: str | None,
        extra: Any,
        flight: Flight,
    ) -> int:
        body: dict[str, Any] = {"model": self._server.model}
        if prompt is not None:
            body["prompt"] = prompt
        else:
            body |= {"messages": messages} | {k: extra[k] for k in _COUNTED if k in extra}
        counted = await self._server.upstream.demand(
            "POST", f"{self._server.root()}/tokenize", body, flight=flight
        )
        return int(counted["count"])


def _refuse_remote_images(messages: Sequence[Message]) -> None:
    """Raises Unsupported where the server would fetch an image for a caller."""
    parts = (
        part
        for message in messages
        if isinstance(content := message.get("content"), list)
        for part in content
        if part.get("type") == "image_url"
    )
    if any(not part["image_url"]["url"].startswith("data:") for part in parts):
        raise Unsupported(
            "this server fetches no images; send them as data: URLs, or have its `remote_images` "
            "set to true",
            param="messages",
        )
