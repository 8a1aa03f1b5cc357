"""A router's questions to an LLM about one query, and what becomes of them where no answer comes.
Knows no router, no prompt and no engine."""

from __future__ import annotations

import asyncio
import logging
import re
from contextlib import aclosing
from time import perf_counter
from typing import Any

from composer.errors import ComposerError
from composer.types import Ask, Message, Sampling

log = logging.getLogger(__name__)

_THOUGHT = re.compile(r".*</think>|<think>.*", re.DOTALL)
"""What a reasoning model writes before its answer, or instead of it where its tokens run out."""


class Asking:
    """The questions of one decision. `failed` says why the last one was not answered: `not_asked`
    (no engine runs here, or the request excludes the expert), `timeout`, `empty`, the code of a
    ComposerError, `nonsense` where the router could not use the answer, None where all went well;
    `failures` has these of all questions.
    """

    def __init__(self, ask: Ask | None, expert: str, timeout_s: float | None) -> None:
        """`timeout_s` bounds all questions together, the wait for a lease included; None: no
        bound."""
        self.failed: str | None = None
        self.failures: list[str] = []
        self._ask = ask
        self._expert = expert
        self._timeout_s = timeout_s
        self._calls = 0
        self._began = perf_counter()

    async def say(
        self, text: str, *, max_tokens: int, temperature: float = 0.0, seed: int | None = None
    ) -> str | None:
        """What the expert answers, without what it thought before; None, and `failed`, where
        nothing came. May be called while others are under way."""
        if self._ask is None:
            self._failed("not_asked")
            return None
        self._calls += 1
        messages: tuple[Message, ...] = ({"role": "user", "content": text},)
        sampling = Sampling(max_tokens=max_tokens, temperature=temperature, seed=seed)
        try:
            async with asyncio.timeout(self._left()):
                answer = self._ask(self._expert, messages=messages, sampling=sampling)
                async with aclosing(answer) as chunks:
                    said = "".join([chunk.text async for chunk in chunks])
        except TimeoutError:
            self._fail("timeout", f"no answer within {self._timeout_s:g} s")
            return None
        except ComposerError as error:
            self._fail(error.code, str(error))
            return None
        except Exception:  # a fault of ours: the request is to be answered all the same
            log.exception("router: asking %r failed", self._expert)
            self._failed("internal_error")
            return None
        said = _THOUGHT.sub("", said).strip()
        if not said:
            self._fail("empty", "an empty answer")
            return None
        return said

    def nonsense(self, answer: str) -> None:
        """The router could not use what was answered."""
        self._fail("nonsense", f"cannot use {answer[:200]!r}")

    @property
    def told(self) -> dict[str, Any]:
        """For `Scores.told`: who was asked, how often, how long it took in all, and `failed`."""
        told: dict[str, Any] = {
            "expert": self._expert,
            "calls": self._calls,
            "ms": round((perf_counter() - self._began) * 1000, 3),
        }
        return told if self.failed is None else {**told, "failed": self.failed}

    def _left(self) -> float | None:
        if self._timeout_s is None:
            return None
        return max(0.0, self._timeout_s - (perf_counter() - self._began))

    def _fail(self, code: str, why: str) -> None:
        self._failed(code)
        log.warning("router: asking %r: %s; it decides without", self._expert, why)

    def _failed(self, code: str) -> None:
        self.failed = code
        self.failures.append(code)
