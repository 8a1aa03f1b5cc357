"""An expert asked through a running service: (expert, messages) → what it said. Knows OpenAI's wire
format, and nothing of questions, scores or files."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol, Self

import httpx
import orjson

from composer.engines.http import retry_after
from composer.types import Message
from router_training.cells import listed
from router_training.errors import AskError, AskFailed, AskRefused

BUSY = (429, 503)
"""Statuses that say: later."""

PASSING = (408, 409, 425)
"""Statuses of a request that another time would be answered."""

FAULT_RETRIES = 2
"""Further tries after any other failure of a server, which rarely helps twice."""

LONGEST_PAUSE_S = 60.0
"""Between two tries where the service names no time."""

WAIT_S = 600.0
"""How long one call is tried while the service says that it has no room, or is not there."""

LOST_S = 60.0
"""The same, while nobody answers at its address: what a restart takes."""

TIMEOUT_S = 3600.0
"""How long one answer may take: a batch call waits until its model's turn comes."""


@dataclass(frozen=True, slots=True)
class Said:
    """`finish_reason` is "length" where the answer was cut off. Tokens and `cost_usd`, US dollars,
    are None where the service does not say."""

    text: str
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cost_usd: float | None = None


class Ask(Protocol):
    async def __call__(self, expert: str, messages: Sequence[Message]) -> Said:
        """One answer. Raises AskRefused or AskFailed where this call has none, AskError where no
        call can have one."""
        ...


@dataclass(frozen=True, slots=True)
class How:
    """What every call is asked with. `more` are further fields of the wire, as they are."""

    temperature: float | None = 0.0
    max_tokens: int | None = None
    more: Mapping[str, Any] = field(default_factory=dict)

    def body(self) -> dict[str, Any]:
        given = {"temperature": self.temperature, "max_tokens": self.max_tokens}
        return {**{name: v for name, v in given.items() if v is not None}, **self.more}


class Endpoint:
    """A service's OpenAI-compatible endpoint, as an `Ask`; an async context manager.

    Calls wait out 429 and 503 by Retry-After, for `wait_s` in all. Against our own service they
    have the priority of a batch: they give way to whoever is waiting for an answer now.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        how: How | None = None,
        wait_s: float = WAIT_S,
        timeout_s: float = TIMEOUT_S,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """`url` with or without `/v1` at its end; `transport` in place of the network."""
        self.url = url.rstrip("/").removesuffix("/v1")
        self.how = how or How()
        self._wait_s = wait_s
        self._batch: dict[str, Any] = {}
        self._revisions: dict[str, str] = {}
        try:
            self._client = httpx.AsyncClient(
                base_url=self.url,
                headers={} if api_key is None else {"authorization": f"Bearer {api_key}"},
                timeout=httpx.Timeout(timeout_s, connect=10.0),
                limits=httpx.Limits(max_connections=None),
                transport=transport,
            )
            known = self._client.base_url.scheme in ("http", "https")
        except (httpx.InvalidURL, UnicodeError, ValueError):
            known = False
        if not known:
            raise AskError(f"{url!r} is no address; write it as http://127.0.0.1:8000")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._client.aclose()

    async def experts(self) -> tuple[str, ...]:
        """Those that can be asked by name, in the service's order; from now on it is known whose
        service it is. Raises AskError where there is none."""
        try:
            response = await self._client.get("/v1/models", timeout=30.0)
        except httpx.TransportError as error:
            raise self._nobody(error) from error
        if response.status_code != 200:
            raise self._no_call(response) or AskError(
                f"{self.url} answers GET /v1/models with status {response.status_code}: "
                f"{_reason(response)}; name the address of an OpenAI-compatible service"
            )
        try:
            models = response.json()["data"]
            ours = [m["id"] for m in models if m.get("composer", {}).get("kind") == "expert"]
            everybody = [m["id"] for m in models]
            told = {m["id"]: m.get("composer", {}).get("revision") for m in models}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise AskError(
                f"{self.url} answers GET /v1/models with what is no list of models; name the "
                "address of an OpenAI-compatible service"
            ) from error
        if not ours:
            return tuple(everybody)
        self._batch = {"composer": {"priority": "batch"}}
        self._revisions = {id_: str(revision) for id_, revision in told.items() if revision}
        return tuple(ours)

    def source(self, expert: str) -> str:
        """Whose answers these are: the expert's revision where the service told one (`experts`),
        which is the same at every address, else the address."""
        revision = self._revisions.get(expert)
        return self.url if revision is None else f"revision {revision}"

    async def check(self, wanted: Sequence[str]) -> tuple[str, ...]:
        """The experts wanted, none: all. Raises AskError, naming those that are not there."""
        there = await self.experts()
        if unknown := [expert for expert in wanted if expert not in there]:
            raise AskError(
                f"{self.url} has no expert {listed(unknown)}; it has: {listed(there) or 'none'}"
            )
        if not there:
            raise AskError(f"{self.url} has no experts; add some to its experts.yaml")
        return tuple(wanted) or there

    async def __call__(self, expert: str, messages: Sequence[Message]) -> Said:
        body = {"model": expert, "messages": list(messages), **self.how.body(), **self._batch}
        clock = asyncio.get_running_loop().time
        began, tries, faults = clock(), 0, 0
        while True:
            tries += 1
            try:
                response = await self._client.post("/v1/chat/completions", json=body)
            except httpx.TimeoutException as error:
                raise AskFailed(
                    f"expert {expert!r} did not answer within the call's time; allow more"
                ) from error
            except httpx.TransportError as error:
                problem: AskError = self._nobody(error)
                pause, wait = _backoff(tries), min(self._wait_s, LOST_S)
            else:
                if response.status_code == 200:
                    return _said(response, expert)
                if fatal := self._no_call(response):
                    raise fatal
                status, reason = response.status_code, _reason(response)
                if status not in BUSY:
                    faults += 1
                    if status < 500 and status not in PASSING:
                        raise AskRefused(f"expert {expert!r} refuses (status {status}): {reason}")
                problem = AskFailed(f"expert {expert!r} fails (status {status}): {reason}")
                named = retry_after(response.headers) if status in BUSY else None
                pause = _backoff(tries) if named is None else named
                wait = self._wait_s
            if faults > FAULT_RETRIES or clock() + pause > began + wait:
                raise problem
            await asyncio.sleep(pause)

    def _nobody(self, error: httpx.TransportError) -> AskError:
        return AskError(
            f"no service answers at {self.url} ({error or type(error).__name__}); start it "
            "(`composer serve`), or give its address"
        )

    def _no_call(self, response: httpx.Response) -> AskError | None:
        """The error, where no other call of the same kind would fare better."""
        if response.status_code == 401:
            return AskError(
                f"{self.url} wants another key: {_reason(response)}; set the variable that holds it"
            )
        if response.status_code == 402:
            return AskError(f"{self.url} wants to be paid: {_reason(response)}; then ask again")
        if response.status_code == 404:
            return AskError(f"{self.url}: {_reason(response)}; see GET /v1/models")
        return None


def _said(response: httpx.Response, expert: str) -> Said:
    try:
        body = orjson.loads(response.content)
        choice = body["choices"][0]
        usage = body.get("usage") or {}
        text = choice["message"].get("content") or ""
        counts = [usage.get(f"{name}_tokens") for name in ("prompt", "completion")]
        if not any(counts):  # our service says 0 where its engine did not count
            counts = [None, None]
        return Said(
            text=str(text),
            finish_reason=choice.get("finish_reason"),
            prompt_tokens=counts[0],
            completion_tokens=counts[1],
            cost_usd=(body.get("composer") or {}).get("cost_usd"),
        )
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise AskFailed(f"expert {expert!r}: the answer is not OpenAI's chat format") from error


def _reason(response: httpx.Response) -> str:
    """The service's own words, of a page a few."""
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return " ".join(response.text.split())[:200] or "it says nothing"


def _backoff(tries: int) -> float:
    """Doubling, with jitter, so that callers turned away together do not come back together."""
    return float(min(LONGEST_PAUSE_S, 2.0 ** (tries - 1)) * random.uniform(0.5, 1.0))
