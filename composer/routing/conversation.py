"""Which part of a conversation a router is asked about. Works for every router alike: all it needs
of one is its scores. Knows no embedder, no request and no session.

A follow-up may be a question of its own ("and what is the capital of France?"), or mean nothing
without what came before ("and this one: fox"). No list of words tells the two apart in every
language. The scores do: of a text that says nothing a router can hardly tell its experts apart.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from composer.routing.base import Query, Router, Scores
from composer.types import Ask, BoolArray

READ_CHARS = 1000
"""Of a joined reading: the 256 tokens that the default embedder reads, at four characters a token.
It reads the beginning of a text, so what is longer would lose its last turn."""

ASKED_CHARS = 6000
"""Of a reading for an LLM."""

UNDERSTOOD = 2 / 3
"""Gain from which on a reading needs no more words: its best expert is at least twice as likely
right as wrong. Chosen on conversations of its own, where 0.55 to 0.88 do better than none:
`benchmarks/results/conversations.md`."""

GAP = " … "


async def score(
    router: Router, query: Query, eligible: BoolArray, ask: Ask | None = None
) -> tuple[Scores, int]:
    """The scores of the reading that is taken, and how many of the user's turns it reaches back.

    It is the shortest that is `UNDERSTOOD`, else the one that tells the eligible experts apart
    best; of equal ones the shorter. What is measured is the gain of the best expert over another
    drawn at random, in calibrated quality. A router that finds experts by what is said of
    them expects next to nothing of anybody where it understands nothing. One trained on outcomes
    then expects each expert's mean, so that the spread of the means is in every reading's gain and
    cancels.

    The shortest, not the clearest: whoever answered before is as clear as ever from the words that
    he was asked with, so a reading that repeats them outdoes a change of subject in few words.

    A router that asks an LLM is given all turns and nothing else: an LLM knows what a follow-up
    follows, and three readings would be three calls. What it embeds beside that is cut to what an
    embedder reads. Where it cannot be asked (`ask` None) the router falls back, and is read as any
    other.

    `eligible` (E,). The readings are scored at once: an embedder makes one batch of them.
    """
    if router.asked is not None and ask is not None:
        text, reach = readings(query)[-1]
        every = [*_turns(query), query.text]
        whole = joined(every, ASKED_CHARS) if reach > 1 else _cut(query.text, ASKED_CHARS)
        read = replace(_read(query, text), for_llm=whole)
        return await router.score(read, eligible, ask), reach
    found = readings(query)
    scored = await asyncio.gather(
        *(router.score(_read(query, text), eligible) for text, _ in found)
    )
    gains = [_gain(scores) for scores in scored]
    understood = (i for i, gain in enumerate(gains) if gain >= UNDERSTOOD)
    best = next(understood, int(np.argmax(gains)))  # argmax: the first of equal ones
    return scored[best], found[best][1]


def _read(query: Query, text: str) -> Query:
    return replace(query, text=text, earlier=())


def _turns(query: Query) -> list[str]:
    return [turn for turn in query.earlier if turn.strip()]


def readings(query: Query) -> list[tuple[str, int]]:
    """The last turn alone, with the turn before it, and with all turns, as far as these differ;
    each with the number of turns that it reaches back.

    At most three, because each is an embedding: what a follow-up refers to is mostly said just
    before it, or is what the conversation is about, which its first turn says.
    """
    turns = _turns(query)
    found = [(query.text, 1)]
    if turns:
        found.append((joined([turns[-1], query.text]), 2))
    if len(turns) > 1:
        found.append((joined([*turns, query.text]), len(turns) + 1))
    return found


def read_then(turns: Sequence[str], turns_read: int | None) -> str:
    """The reading that was taken of a conversation, oldest turn first, from how many turns it
    reached back. None: nobody chose one, as where a request names its expert; then all turns, since
    a follow-up alone may say nothing."""
    found = readings(Query(turns[-1], tuple(turns[:-1])))
    if turns_read is None:
        return found[-1][0]
    return next(text for text, reach in reversed(found) if reach <= max(turns_read, 1))


def joined(turns: Sequence[str], room: int = READ_CHARS) -> str:
    """Turns in their order, a line each, in about `room` characters. The first and the last are
    always there, cut in their middle where both are long; of those between them the latest that
    fit."""
    first, *between, last = turns
    half = room // 2
    last = _cut(last, max(half, room - len(first)))
    first = _cut(first, max(half, room - len(last)))
    left = room - len(first) - len(last)
    kept: list[str] = []
    for turn in reversed(between):
        left -= len(turn) + 1
        if left < 0:
            break
        kept.append(turn)
    return "\n".join([first, *reversed(kept), last])


def _cut(text: str, room: int) -> str:
    """Beginning and end: what is wanted stands before or behind what it is wanted of."""
    if len(text) <= room:
        return text
    half = (room - len(GAP)) // 2
    return text[:half] + GAP + text[-half:]


def _gain(scores: Scores) -> float:
    """Of the best over the mean of the others; 0 where there is no other."""
    quality = np.sort(scores.quality[~np.isnan(scores.quality)].astype(np.float64))
    return float(quality[-1] - quality[:-1].mean()) if len(quality) > 1 else 0.0
