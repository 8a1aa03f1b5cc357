"""The skills a question asks for, in an LLM's words: what it is asked, and which of its words are
kept. Knows no LLM, no embedder and no expert. Source: Symbolic-MoE, arXiv 2503.05641."""

from __future__ import annotations

import re
from collections.abc import Sequence

SAMPLES = 5
TEMPERATURE = 0.7
MAX_TOKENS = 64
"""Of one sample."""

MAX_CHARS = 20
"""Of a keyword: what is longer is a phrase that no other question will share."""

PROMPT = """Below is a question. Do not answer it. Which 2 to 5 skills or fields of knowledge does \
it take to answer it? Reply with one or two words for each, separated by commas, and nothing else.

Question:
<<<
{text}
>>>

Skills:"""

_BETWEEN = re.compile(r"[,;\n]")
_BEFORE = re.compile(r"^\s*(?:skills\s*:|[-*•]|\d+[.)])?\s*", re.IGNORECASE)


def keywords_of(answer: str) -> tuple[str, ...]:
    """Of one sample, in lower case, each once. Those over 20 characters, and what has no letter,
    are dropped."""
    words = [
        " ".join(_BEFORE.sub("", part).strip(" \"'`*.").lower().split())
        for part in _BETWEEN.split(answer)
    ]
    kept = [word for word in words if len(word) <= MAX_CHARS and any(map(str.isalpha, word))]
    return tuple(dict.fromkeys(kept))


def agreed(answers: Sequence[str]) -> tuple[str, ...]:
    """The keywords that more than one of several samples has, the most frequent first; all of a
    single one."""
    every = [keywords_of(answer) for answer in answers]
    found = list(dict.fromkeys(word for words in every for word in words))
    count = {word: sum(word in words for words in every) for word in found}
    least = 2 if len(answers) > 1 else 1
    return tuple(sorted((w for w in found if count[w] >= least), key=lambda word: -count[word]))
