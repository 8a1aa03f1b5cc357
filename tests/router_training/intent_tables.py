"""Tables of intents whose answers are known: a few words of its own for each, and strangers."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from composer.routing.outcomes import Outcomes
from router_training.groups import groups_of

WORDS = {
    "weather": "rain snow sunny forecast umbrella storm cloudy degrees",
    "banking": "account transfer balance card payment savings loan cheque",
    "travel": "flight hotel passport luggage ticket airport visa train",
    "kitchen": "recipe bake oven flour simmer garlic roast spoon",
}
FILLER = ["please", "tell", "me", "about", "the", "what", "is", "my", "a", "for", "now", "today"]
INTENTS = tuple(sorted(WORDS))
STRANGE = [f"{a}{b}" for a in ("quark", "sonnet", "tariff", "glacier") for b in "abcdefgh"]


def intents(n: int = 160, strangers: int = 40, seed: int = 0) -> Outcomes:
    """`n` questions that are somebody's, then `strangers` that are nobody's."""
    rng = np.random.default_rng(seed)
    owner = rng.integers(len(INTENTS), size=n)
    texts = [_text(WORDS[INTENTS[o]].split(), rng) for o in owner]
    texts += [_text(STRANGE, rng) for _ in range(strangers)]
    quality = np.zeros((n + strangers, len(INTENTS)), np.float32)
    quality[np.arange(n), owner] = 1
    return Outcomes(
        experts=INTENTS,
        text=tuple(texts),
        quality=quality,
        cost=np.full_like(quality, np.nan),
        category=("",) * len(texts),
        benchmark=("bank",) * len(texts),
        group=groups_of(texts, [None] * len(texts)),
    )


def _text(own: list[str], rng: np.random.Generator) -> str:
    words = [*rng.choice(own, 2, replace=False), *rng.choice(FILLER, 3, replace=False)]
    rng.shuffle(words)
    return " ".join(map(str, words))


def write_intents(path: Path, outcomes: Outcomes) -> Path:
    """As the CSV that `intents.py` reads."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["query", "intent"])
        for text, row in zip(outcomes.text, outcomes.quality, strict=True):
            writer.writerow([text, INTENTS[int(row.argmax())] if row.any() else "oos"])
    return path
