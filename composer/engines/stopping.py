"""From token ids to the text a caller may see. Pure Python: knows no model and no thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Sequence

from composer.types import Chunk, FinishReason, TokenLogprob

REPLACEMENT = "\ufffd"
"""What a tokenizer decodes an unfinished UTF-8 sequence to."""

PROMPT_TAIL = 6
"""Prompt tokens kept as left context, so that a first token keeps its leading space."""

LONGEST_CHARACTER = 16
"""Tokens one character may take before its bytes count as broken rather than unfinished."""

Decode = Callable[[Sequence[int]], str]


class Detokenizer:
    """Tokens in, finished characters out.

    A token alone has no text: it may be part of a character, and many tokenizers drop the
    leading space of whatever comes first. So each new token is decoded together with those of
    the last text given out, and only what is new is returned.
    """

    def __init__(self, decode: Decode, prompt: Sequence[int]) -> None:
        self._decode = decode
        self._window = list(prompt[-PROMPT_TAIL:])
        self._known = len(self._window)
        self._known_text = decode(self._window)

    def push(self, token: int) -> str:
        """The text this token completes; empty while a character is unfinished."""
        self._window.append(token)
        text = self._decode(self._window)
        unfinished = len(self._window) - self._known < LONGEST_CHARACTER
        if len(text) <= len(self._known_text) or (text.endswith(REPLACEMENT) and unfinished):
            return ""
        new = text[len(self._known_text) :]
        self._window = self._window[self._known :]
        self._known = len(self._window)
        self._known_text = self._decode(self._window)
        return new

    def flush(self) -> str:
        """What is left at the end: an unfinished character, as the tokenizer shows it."""
        return self._decode(self._window)[len(self._known_text) :]


class StopScanner:
    """Text in, text that certainly precedes any stop string out.

    Generation ends where the first stop string is complete (of two that end there, the longer
    counts); it and all after it is never given out. The result does not depend on how the
    text was cut into pieces.
    """

    def __init__(self, stops: Collection[str]) -> None:
        self._stops = tuple(stops)
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """(text to give out, whether a stop string was found)."""
        held = self._held + text
        found = [(at + len(s), at) for s in self._stops if (at := held.find(s)) >= 0]
        if found:
            self._held = ""
            return held[: min(found)[1]], True
        keep = self._begun(held)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep], False

    def flush(self) -> str:
        """What was held back, now that nothing follows."""
        held, self._held = self._held, ""
        return held

    def _begun(self, text: str) -> int:
        """Length of the longest end of `text` that may be the beginning of a stop string."""
        for length in range(min(len(text), self._longest - 1), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0


class Answer:
    """One choice of a call as it grows: tokens in, chunks out, ended once.

    Log-probabilities leave with the text they belong to; those of tokens within the stop
    string leave never, and the end-of-sequence token has none.
    """

    def __init__(
        self,
        index: int,
        *,
        decode: Decode,
        prompt: Sequence[int],
        stops: Collection[str],
        ends: Collection[int],
        budget: int,
    ) -> None:
        """`budget` is the most tokens to take; `ends` are the end-of-sequence ids."""
        self.index = index
        self.tokens = 0
        self.ended = False
        self._text = Detokenizer(decode, prompt)
        self._stops = StopScanner(stops)
        self._ends = ends
        self._budget = budget
        self._seen = 0  # characters the model has written
        self._given = 0  # characters given out
        self._logprobs: deque[tuple[int, TokenLogprob]] = deque()

    def push(self, token: int, logprob: TokenLogprob | None) -> Chunk | None:
        """The next chunk, or None where there is nothing to show yet. The chunk that ends the
        answer has a finish reason."""
        self.tokens += 1
        if token in self._ends:
            return self._end("stop")
        if logprob is not None:
            self._logprobs.append((self._seen, logprob))
        text = self._text.push(token)
        self._seen += len(text)
        text, stopped = self._stops.push(text)
        if stopped:
            return self._chunk(text, "stop")
        if self.tokens >= self._budget:
            return self._end("length", text)
        return self._chunk(text, None) if text else None

    def _end(self, reason: FinishReason, text: str = "") -> Chunk:
        rest, stopped = self._stops.push(self._text.flush())
        text += rest
        if stopped:
            return self._chunk(text, "stop")
        return self._chunk(text + self._stops.flush(), reason)

    def _chunk(self, text: str, reason: FinishReason | None) -> Chunk:
        self._given += len(text)
        self.ended = reason is not None
        logprobs = []
        while self._logprobs and self._logprobs[0][0] < self._given:
            logprobs.append(self._logprobs.popleft()[1])
        return Chunk(text, self.index, tuple(logprobs), reason)
