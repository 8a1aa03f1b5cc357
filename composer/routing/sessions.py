"""Which experts a conversation had last, so that it may keep them (`choose`). Keeps digests and
ids, no text. In this process: replicas behind one address each know the turns they answered, so a
balancer should send a session to the same one."""

from __future__ import annotations

import hashlib
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import orjson

from composer.types import Policy, Request

MOST = 100_000
"""Sessions kept, some 300 bytes each."""

EXPIRY_S = 3600.0
"""Seconds after its last answer in which a session is forgotten: no prefix stays warm longer."""

_HEAD = frozenset({"system", "developer"})


@dataclass(frozen=True, slots=True)
class Session:
    """`key` is a digest under this process's own secret. `begins`: it cannot have had experts
    before, whatever is kept under its key."""

    key: bytes
    begins: bool


class Sessions:
    """The experts of each session's last answer, the latest `most` sessions. Used from one event
    loop only."""

    def __init__(
        self,
        *,
        most: int = MOST,
        expiry_s: float = EXPIRY_S,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._most = most
        self._expiry_s = expiry_s
        self._now = now
        self._secret = secrets.token_bytes(32)
        self._kept: OrderedDict[bytes, tuple[float, tuple[str, ...]]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def of(self, request: Request, policy: Policy) -> Session | None:
        """The session of a request under a policy; None where none is kept: the policy does not
        stay, the request is of a batch (whose lines are asked in another order than written), or
        it has neither a key nor turns.

        A key names the session outright. Without one it is the caller's conversation that began
        with these turns: the system messages and the user's first one. Its first request begins
        it anew, so that a common opening ("hi") hands on no expert by itself; two conversations
        of one caller that begin alike and run at the same time are taken for one.
        """
        if policy.stay == 0 or request.priority == "batch":
            return None
        if request.session:
            parts: Sequence[bytes] = (b"key", request.session.encode("utf-8", "surrogatepass"))
            return Session(self._digest(request, policy, parts), begins=False)
        if not any(message["role"] == "user" for message in request.messages):
            return None
        parts = (b"turns", *_first_turns(request))
        return Session(self._digest(request, policy, parts), begins=len(request.turns) == 1)

    def experts(self, session: Session) -> tuple[str, ...]:
        """Who answered last in it, () where nobody has, or too long ago."""
        kept = self._kept.get(session.key)
        if session.begins or kept is None or self._now() - kept[0] > self._expiry_s:
            return ()
        return kept[1]

    def keep(self, session: Session, experts: Sequence[str]) -> None:
        """From now on these are the session's experts."""
        now = self._now()
        self._kept[session.key] = (now, tuple(experts))
        self._kept.move_to_end(session.key)
        while self._kept:  # the order is that of their last answers
            oldest, (at, _) = next(iter(self._kept.items()))
            if len(self._kept) <= self._most and now - at <= self._expiry_s:
                break
            del self._kept[oldest]

    def _digest(self, request: Request, policy: Policy, parts: Sequence[bytes]) -> bytes:
        """Nobody's key reaches another caller's session, nor another policy's."""
        digest = hashlib.blake2b(key=self._secret, digest_size=16)
        for part in (policy.id.encode(), request.caller.encode(), *parts):
            digest.update(len(part).to_bytes(8, "big"))
            digest.update(part)
        return digest.digest()


def _first_turns(request: Request) -> Iterator[bytes]:
    """The system messages up to the user's first message, and that one, images included."""
    for message in request.messages:
        if message["role"] in _HEAD or message["role"] == "user":
            yield orjson.dumps([message["role"], message.get("content")])
        if message["role"] == "user":
            return
