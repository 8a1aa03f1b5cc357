"""A stand-in for a vLLM 0.32 server, over real HTTP on loopback: the same routes, bodies, errors
and events, byte for byte where it matters, and a model that is a plain function.

The base model answers `base:` and the last message's words; an adapter answers its folder's name
instead of `base`. A word is a token. What can go wrong is a field to set (see `Faults`).

    async with serve(FakeVllm(api_key="k")) as fake: …fake.url…      in a test
    python -m tests.engines.upstream --port 8000 --model m --enable-lora …      as a process
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import math
import os
import socket
import sys
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

FINGERPRINT = "vllm-0.32.0-fake"
CREATED = 1_795_381_578


@dataclass
class Faults:
    """What goes wrong. Times are in seconds."""

    first_s: float = 0.0
    """before the first token"""
    token_s: float = 0.0
    """before each other token"""
    load_s: float = 0.0
    """to read an adapter's files"""
    hang_after: int | None = None
    """tokens, then nothing more"""
    drop_after: int | None = None
    """tokens, then the connection is cut"""
    error_after: tuple[int, dict[str, Any]] | None = None
    """tokens, then this as an `error` event"""
    refuse: list[tuple[int, Any, dict[str, str]]] = field(default_factory=list)
    """status, body and headers of the next calls, instead of answers"""
    usage: bool = True
    keep_alive_s: float | None = None
    """a comment whenever nothing was sent for so long, as `--sse-keep-alive-interval`"""
    health: int = 200
    wake_loses_adapters: bool = False
    """from then on they load without a complaint, and answer as the base model does (as in vLLM
    issue 53888), until the process is started anew"""
    wake_fails: bool = False
    reload_forgotten: bool = False
    """weights are not what they were after a level-2 wake"""


@dataclass
class Seen:
    """One generation request."""

    path: str
    body: dict[str, Any]
    headers: dict[str, str]
    model: str
    aborted: bool = False
    tokens: int = 0


@dataclass
class FakeVllm:
    """`behaviour` of each name is what it answers with; see the module."""

    api_key: str | None = None
    served_name: str = "base-model"
    max_model_len: int = 512
    enable_lora: bool = True
    runtime_loras: bool = True
    max_loras: int = 1
    max_cpu_loras: int = 0
    dev_mode: bool = False
    faults: Faults = field(default_factory=Faults)
    url: str = ""
    requests: list[Seen] = field(default_factory=list)
    loads: list[str] = field(default_factory=list)
    """adapters whose files were read, in order, as vLLM's log has them"""
    registered: dict[str, str] = field(default_factory=dict)
    most_adapters: int = 0
    """distinct adapters that ever ran at once"""
    weights: str = "base"
    sleeping: int | None = None
    slept: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._behaviour: dict[str, str] = {}
        self._memory: OrderedDict[str, None] = OrderedDict()
        self._running: dict[str, int] = {}
        self._room = asyncio.Condition()
        self._awake = asyncio.Event()
        self._awake.set()
        self._aborting = asyncio.Event()
        self._deaf = False

    # --- what tests do to it -------------------------------------------------------------

    def forget_adapters(self) -> None:
        """As a server that was restarted behind our back."""
        self.registered.clear()
        self._behaviour.clear()
        self._memory.clear()
        self._deaf = False

    def generations(self, path: str = "") -> list[Seen]:
        """Requests for answers, without probes (which ask for one token and logprobs)."""
        return [
            seen
            for seen in self.requests
            if seen.path.endswith(path)
            and not (seen.body.get("max_tokens") == 1 and seen.body.get("logprobs") == 5)
        ]

    # --- the server ----------------------------------------------------------------------

    def app(self) -> Starlette:
        routes = [
            Route("/health", self._health),
            Route("/v1/models", self._models),
            Route("/v1/chat/completions", self._generate, methods=["POST"]),
            Route("/v1/completions", self._generate, methods=["POST"]),
            Route("/tokenize", self._tokenize, methods=["POST"]),
        ]
        if self.enable_lora and self.runtime_loras:
            routes += [
                Route("/v1/load_lora_adapter", self._load, methods=["POST"]),
                Route("/v1/unload_lora_adapter", self._unload, methods=["POST"]),
            ]
        if self.dev_mode:
            routes += [
                Route("/sleep", self._sleep, methods=["POST"]),
                Route("/wake_up", self._wake_up, methods=["POST"]),
                Route("/is_sleeping", self._is_sleeping),
                Route("/collective_rpc", self._rpc, methods=["POST"]),
            ]
        return Starlette(routes=routes)

    def _refused(self, request: Request) -> Response | None:
        """vLLM guards /v1 and nothing else."""
        if self.api_key is None or not request.url.path.startswith("/v1"):
            return None
        if request.headers.get("authorization") == f"Bearer {self.api_key}":
            return None
        return JSONResponse({"error": "Unauthorized"}, 401)

    async def _health(self, request: Request) -> Response:
        return Response(status_code=self.faults.health)

    async def _models(self, request: Request) -> Response:
        if refused := self._refused(request):
            return refused
        card = {"object": "model", "created": CREATED, "owned_by": "vllm"}
        base = {"id": self.served_name, "parent": None, "max_model_len": self.max_model_len}
        data = [card | base]
        for name, path in self.registered.items():
            data.append(card | {"id": name, "root": path, "parent": self.served_name})
        return JSONResponse({"object": "list", "data": data})

    async def _tokenize(self, request: Request) -> Response:
        body = await request.json()
        tokens = list(range(self._count(body)))
        counted = {"count": len(tokens), "max_model_len": self.max_model_len}
        return JSONResponse(counted | {"tokens": tokens, "token_strs": None})

    # --- adapters ------------------------------------------------------------------------

    async def _load(self, request: Request) -> Response:
        if refused := self._refused(request):
            return refused
        body = await request.json()
        name, path = body["lora_name"], body["lora_path"]
        if name in self.registered and not body.get("load_inplace"):
            return _error(
                400,
                f"The lora adapter '{name}' has already been loaded. If you want to load the "
                "adapter in place, set 'load_inplace' to True.",
                "InvalidUserInput",
            )
        await self._awake.wait()
        await asyncio.sleep(self.faults.load_s)
        if not (Path(path) / "adapter_config.json").is_file():
            return _error(404, f"Loading lora {name} failed: No adapter found for {path}")
        config = json.loads((Path(path) / "adapter_config.json").read_text())
        if config.get("r", 8) > 64:
            return _error(500, f"LoRA rank {config['r']} is greater than max_lora_rank 64.")
        self.registered[name] = path
        self._behaviour[name] = "base" if self._deaf else Path(path).name
        self._touch(name)
        return Response(f"Success: LoRA adapter '{name}' added successfully.")

    async def _unload(self, request: Request) -> Response:
        if refused := self._refused(request):
            return refused
        name = (await request.json())["lora_name"]
        if name not in self.registered:
            return _error(404, f"The lora adapter '{name}' cannot be found.")
        del self.registered[name]
        self._memory.pop(name, None)
        return Response(f"Success: LoRA adapter '{name}' removed successfully.")

    def _touch(self, name: str) -> None:
        """vLLM's LRU of adapters in memory."""
        if name in self._memory:
            self._memory.move_to_end(name)
            return
        self.loads.append(name)
        self._memory[name] = None
        while len(self._memory) > max(self.max_cpu_loras, self.max_loras):
            self._memory.popitem(last=False)

    # --- sleep ---------------------------------------------------------------------------

    async def _sleep(self, request: Request) -> Response:
        self.sleeping = int(request.query_params.get("level", 1))
        self.slept.append(self.sleeping)
        self._awake.clear()
        self._aborting.set()  # mode "abort" is the default: what runs ends with that reason
        if self.sleeping == 2:
            self.weights = "garbage"
        return JSONResponse({"status": "sleeping", "level": self.sleeping})

    async def _wake_up(self, request: Request) -> Response:
        if self.faults.wake_fails:
            return _error(500, "CUDA out of memory")
        tags = request.query_params.getlist("tags")
        if not tags or "kv_cache" in tags:
            self.sleeping = None
            self._aborting.clear()
            self._awake.set()
            if self.faults.wake_loses_adapters:
                self._deaf = True
                self._behaviour = dict.fromkeys(self._behaviour, "base")
        return JSONResponse({"status": "sleeping" if self.sleeping else "awake", "tags": tags})

    async def _is_sleeping(self, request: Request) -> Response:
        return JSONResponse({"is_sleeping": self.sleeping is not None})

    async def _rpc(self, request: Request) -> Response:
        if (await request.json())["method"] == "reload_weights" and not (
            self.faults.reload_forgotten
        ):
            self.weights = "base"
        return JSONResponse({"results": [None]})

    # --- generation ----------------------------------------------------------------------

    async def _generate(self, request: Request) -> Response:
        if refused := self._refused(request):
            return refused
        body = await request.json()
        seen = Seen(
            request.url.path, body, dict(request.headers), body.get("model") or self.served_name
        )
        self.requests.append(seen)
        if self.faults.refuse:
            status, answer, headers = self.faults.refuse.pop(0)
            return JSONResponse(answer, status, headers=headers)
        if seen.model != self.served_name and seen.model not in self.registered:
            message = f"The model `{seen.model}` does not exist. Valid aliases: {self.served_name}."
            return _error(404, message, param="model")
        if refusal := self._too_long(body) or _cannot(body):
            return refusal
        answer = _Answer(self, seen)
        if body.get("stream"):
            content = _kept_alive(answer.events(), self.faults.keep_alive_s)
            return StreamingResponse(content, media_type="text/event-stream")
        work = asyncio.create_task(answer.whole())
        gone = asyncio.create_task(_until_gone(request))
        await asyncio.wait([work, gone], return_when=asyncio.FIRST_COMPLETED)
        gone.cancel()
        if not work.done():
            seen.aborted = True
            work.cancel()
            return Response(status_code=499)
        return JSONResponse(work.result())

    def _too_long(self, body: dict[str, Any]) -> Response | None:
        asked = body.get("max_completion_tokens") or body.get("max_tokens") or 0
        prompt, window = self._count(body), self.max_model_len
        if asked > window:
            return _error(
                400,
                f"max_tokens={asked} cannot be greater than max_model_len={window}. Please request "
                f"fewer output tokens. (parameter=max_tokens, value={asked})",
                param="max_tokens",
            )
        if prompt > window:
            return _error(
                400,
                f"This model's maximum context length is {window} tokens. However, your prompt "
                f"contains at least {prompt} input tokens, which exceeds this limit even without "
                "any output tokens. Please reduce the length of the input prompt. "
                f"(parameter=input_tokens, value={prompt})",
                param="input_tokens",
            )
        return None

    def limit(self, body: dict[str, Any]) -> int:
        """Tokens of the answer at most: what is asked for is cut to the room there is."""
        asked = body.get("max_completion_tokens") or body.get("max_tokens")
        if asked is None and "prompt" in body:
            asked = 16
        room = self.max_model_len - self._count(body)
        return room if asked is None else min(asked, room)

    def _count(self, body: dict[str, Any]) -> int:
        if body.get("messages") is None:
            return len(str(body["prompt"]).split())
        return sum(3 + len(_text_of(m.get("content")).split()) for m in body["messages"])

    def words(self, seen: Seen) -> list[str]:
        """The answer's tokens."""
        body = seen.body
        asked = body["prompt"] if "prompt" in body else _text_of(body["messages"][-1]["content"])
        base = self.weights == "base"
        who = "base" if seen.model == self.served_name else self._behaviour[seen.model]
        text = f"{who if base else self.weights}: {asked}".split(" ")
        words = [word if i == 0 else f" {word}" for i, word in enumerate(text)]
        return words[: self.limit(body)]

    def finish(self, seen: Seen) -> str:
        if self._aborting.is_set():
            return "abort"
        return "length" if len(self.words(seen)) == self.limit(seen.body) else "stop"

    @contextlib.asynccontextmanager
    async def running(self, seen: Seen) -> AsyncIterator[None]:
        """At most `max_loras` distinct adapters run at once; the others wait."""
        await self._awake.wait()
        if seen.model == self.served_name:
            yield
            return
        async with self._room:
            await self._room.wait_for(
                lambda: seen.model in self._running or len(self._running) < self.max_loras
            )
            self._running[seen.model] = self._running.get(seen.model, 0) + 1
            self.most_adapters = max(self.most_adapters, len(self._running))
        self._touch(seen.model)
        try:
            yield
        finally:
            self._running[seen.model] -= 1
            if not self._running[seen.model]:
                del self._running[seen.model]
            async with self._room:
                self._room.notify_all()

    @property
    def aborting(self) -> asyncio.Event:
        return self._aborting


class _Answer:
    """One answer on its way."""

    def __init__(self, fake: FakeVllm, seen: Seen) -> None:
        self._fake = fake
        self._seen = seen
        self._chat = "messages" in seen.body
        self._n = seen.body.get("n") or 1
        prefix = "chatcmpl-" if self._chat else "cmpl-"
        self._id = prefix + seen.headers.get("x-request-id", "random")

    async def whole(self) -> dict[str, Any]:
        fake, seen = self._fake, self._seen
        async with fake.running(seen):
            await self._pause(fake.faults.first_s)
            words = fake.words(seen)
            for number in range(len(words) * self._n):
                await self._pause(fake.faults.token_s)
                if fake.faults.hang_after is not None and number >= fake.faults.hang_after:
                    await asyncio.Event().wait()
                seen.tokens += 1
            choices = []
            for index in range(self._n):
                choice: dict[str, Any] = {"index": index}
                if self._chat:
                    nothing = {"refusal": None, "annotations": None, "reasoning": None}
                    message = {"role": "assistant", "content": "".join(words)}
                    choice["message"] = message | nothing | self._tools()
                else:
                    choice["text"] = "".join(words)
                choice["logprobs"] = self._logprobs(words)
                choices.append(choice | {"finish_reason": fake.finish(seen), "stop_reason": None})
        kind = "chat.completion" if self._chat else "text_completion"
        body = self._head(kind) | {"choices": choices, "system_fingerprint": FINGERPRINT}
        return body | ({"usage": self._usage(len(words))} if fake.faults.usage else {})

    async def events(self) -> AsyncGenerator[bytes, None]:
        fake, seen, faults = self._fake, self._seen, self._fake.faults
        finished = False
        try:
            async with fake.running(seen):
                await self._pause(faults.first_s)
                words = fake.words(seen)
                if self._chat:
                    for index in range(self._n):
                        yield self._event(index, {"role": "assistant", "content": ""}, None, None)
                for number, word in enumerate(words):
                    for index in range(self._n):
                        await self._fault(number)
                        if faults.error_after is not None and number >= faults.error_after[0]:
                            yield b"data: " + orjson.dumps({"error": faults.error_after[1]})
                            yield b"\n\ndata: [DONE]\n\n"
                            return
                        seen.tokens += 1
                        aborted = fake.aborting.is_set()
                        end = fake.finish(seen) if aborted or number == len(words) - 1 else None
                        yield self._piece(index, word, end)
                    if fake.aborting.is_set():
                        break
            asked = (seen.body.get("stream_options") or {}).get("include_usage")
            if asked and faults.usage:
                last = {"choices": [], "usage": self._usage(len(words))}
                yield _data(self._head(self._kind()) | last | {"system_fingerprint": FINGERPRINT})
            yield b"data: [DONE]\n\n"
            finished = True
        finally:
            seen.aborted = not finished

    async def _fault(self, number: int) -> None:
        faults = self._fake.faults
        await self._pause(faults.token_s if number else 0)
        if faults.hang_after is not None and number >= faults.hang_after:
            await asyncio.Event().wait()
        if faults.drop_after is not None and number >= faults.drop_after:
            raise ConnectionAbortedError("as if killed")

    async def _pause(self, seconds: float) -> None:
        """Ends early when the server goes to sleep."""
        if seconds:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._fake.aborting.wait(), seconds)

    def _piece(self, index: int, word: str, end: str | None) -> bytes:
        delta: dict[str, Any] = {"content": word}
        if end is not None and self._tools():
            delta = self._tools()
        return self._event(index, delta, self._logprobs([word]), end)

    def _event(self, index: int, delta: Any, logprobs: Any, end: str | None) -> bytes:
        choice: dict[str, Any] = {"index": index}
        choice |= {"delta": delta} if self._chat else {"text": delta["content"]}
        choice |= {"logprobs": logprobs, "finish_reason": end}
        if end is not None:
            choice["stop_reason"] = None
        return _data(self._head(self._kind()) | {"choices": [choice]})

    def _kind(self) -> str:
        return "chat.completion.chunk" if self._chat else "text_completion"

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": CREATED, "model": self._seen.model}

    def _usage(self, words: int) -> dict[str, int]:
        prompt = self._fake._count(self._seen.body)
        drawn = words * self._n
        return {
            "prompt_tokens": prompt,
            "total_tokens": prompt + drawn,
            "completion_tokens": drawn,
        }

    def _tools(self) -> dict[str, Any]:
        tools = self._seen.body.get("tools")
        if not tools:
            return {}
        function = {"name": tools[0]["function"]["name"], "arguments": '{"id":"x"}'}
        return {"tool_calls": [{"id": "call_1", "type": "function", "function": function}]}

    def _logprobs(self, words: Sequence[str]) -> dict[str, Any] | None:
        asked = self._seen.body.get("logprobs")
        if asked is None or asked is False:
            return None
        tops = [_alternatives(word, self._seen.body.get("top_logprobs", asked)) for word in words]
        if self._chat:
            return {
                "content": [
                    _token(word, _logprob(word)) | {"top_logprobs": [_token(*t) for t in top]}
                    for word, top in zip(words, tops, strict=True)
                ]
            }
        return {
            "text_offset": [0] * len(words),
            "token_logprobs": [_logprob(word) for word in words],
            "tokens": list(words),
            "top_logprobs": [
                {word: _logprob(word)} | dict(top) for word, top in zip(words, tops, strict=True)
            ],
        }


def _logprob(token: str) -> float:
    """Of a token, always the same, and unlike that of any other."""
    number = int.from_bytes(hashlib.sha256(token.encode()).digest()[:4])
    return -math.log(1.01 + 9 * number / 2**32)


def _alternatives(word: str, count: int) -> list[tuple[str, float]]:
    others = [(f"{word}{i}", _logprob(word) - i) for i in range(1, count)]
    return [(word, _logprob(word)), *others][:count]


def _token(token: str, logprob: float) -> dict[str, Any]:
    return {"token": token, "logprob": logprob, "bytes": list(token.encode())}


def _text_of(content: Any) -> str:
    if isinstance(content, list):
        return " ".join(part["text"] for part in content if part["type"] == "text")
    return content or ""


def _cannot(body: dict[str, Any]) -> Response | None:
    if (body.get("n") or 1) > 1 and body.get("temperature") == 0:
        return _error(400, f"n must be 1 when using greedy sampling, got {body['n']}.")
    return None


def _error(
    status: int, message: str, kind: str | None = None, param: str | None = None
) -> JSONResponse:
    kind = kind or {400: "BadRequestError", 404: "NotFoundError"}.get(status, "InternalServerError")
    error = {"message": message, "type": kind, "param": param, "code": status}
    return JSONResponse({"error": error}, status)


def _data(event: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(event) + b"\n\n"


async def _until_gone(request: Request) -> None:
    with contextlib.suppress(ClientDisconnect):
        while (await request.receive())["type"] != "http.disconnect":
            pass


async def _kept_alive(
    events: AsyncGenerator[bytes, None], every_s: float | None
) -> AsyncGenerator[bytes, None]:
    following = asyncio.ensure_future(anext(events, None))
    try:
        while True:
            done, _ = await asyncio.wait([following], timeout=every_s)
            if not done:
                yield b": keep-alive\n\n"
                continue
            if (event := following.result()) is None:
                return
            yield event
            following = asyncio.ensure_future(anext(events, None))
    finally:
        following.cancel()
        with contextlib.suppress(BaseException):
            await following
        await events.aclose()


# --- serving it ------------------------------------------------------------------------------


class Serving:
    """The fake on a port of 127.0.0.1, in this event loop."""

    def __init__(self, fake: FakeVllm, port: int = 0) -> None:
        self.fake = fake
        self.port = port

    async def start(self) -> None:
        """Listens; after `kill`, on the same port again."""
        # As a TCP socket by name, asyncio switches Nagle off: else each answer takes 40 ms.
        listener = socket.socket(proto=socket.IPPROTO_TCP)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", self.port))
        self.port = listener.getsockname()[1]
        config = uvicorn.Config(self.fake.app(), log_level="critical", lifespan="off", ws="none")
        config.load()
        self._server = uvicorn.Server(config)
        self._server.lifespan = config.lifespan_class(config)
        self._listener = listener
        await self._server.startup([listener])  # and no main loop, which only looks for signals
        self.fake.url = f"http://127.0.0.1:{self.port}/v1"

    async def kill(self) -> None:
        """As kill -9: connections are reset, and nothing is remembered."""
        for server in self._server.servers:
            server.close()
        self._listener.close()
        for connection in list(self._server.server_state.connections):
            connection.transport.abort()
        tasks = list(self._server.server_state.tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.fake.forget_adapters()


@contextlib.asynccontextmanager
async def serve(fake: FakeVllm) -> AsyncIterator[FakeVllm]:
    serving = Serving(fake)
    await serving.start()
    try:
        yield fake
    finally:
        await serving.kill()


def main() -> None:
    """Understands vLLM's command line as far as it matters here, and its environment."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--model", required=True)
    parser.add_argument("--served-model-name")
    parser.add_argument("--enable-lora", action="store_true")
    parser.add_argument("--max-loras", type=int, default=1)
    parser.add_argument("--max-cpu-loras", type=int, default=0)
    parser.add_argument("--max-model-len", type=int, default=512)
    parser.add_argument("--enable-sleep-mode", action="store_true")
    parser.add_argument("--fail", help="end at once, saying this")
    parser.add_argument("--token-s", type=float, default=0.0)
    given, _ = parser.parse_known_args()
    if given.fail:
        sys.exit(given.fail)
    fake = FakeVllm(
        api_key=os.environ.get("VLLM_API_KEY") or None,
        served_name=given.served_model_name or given.model,
        max_model_len=given.max_model_len,
        enable_lora=given.enable_lora,
        runtime_loras=os.environ.get("VLLM_ALLOW_RUNTIME_LORA_UPDATING") == "True",
        max_loras=given.max_loras,
        max_cpu_loras=given.max_cpu_loras,
        dev_mode=os.environ.get("VLLM_SERVER_DEV_MODE") == "1" and given.enable_sleep_mode,
        faults=Faults(token_s=given.token_s),
    )
    uvicorn.run(fake.app(), host=given.host, port=given.port, log_level="warning")


if __name__ == "__main__":
    main()
