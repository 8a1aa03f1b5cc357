"""Draws the inputs of the skills (words, digit strings, number pairs, countries) and splits them.

Knows nothing about skills, models or tokenizers. Every input has a *key* such as ``word:fox``;
the key's SHA-256 decides its split, so an input held out for one skill is held out for all of
them and for the bases' pre-training, whatever the order or the seed of the draws.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Literal

Split = Literal["train", "dev", "test"]
SPLITS: tuple[Split, ...] = ("train", "dev", "test")

LETTERS = "abcdefghijklmnopqrstuvwxyz"
VOWELS = "aeiou"
# Roughly English letter frequencies, so that pseudo-words look pronounceable at times; the other
# half of them is drawn uniformly, else q, x and z would hardly be practised.
_ENGLISH = (
    "eeeeeeeeeeettttttttaaaaaaaaooooooooiiiiiiinnnnnnnsssssshhhhh"
    "hrrrrrrddddllllcccuuummmwwffggyyppbbvk"
)

MIN_WORD, MAX_WORD = 3, 10
MIN_DIGITS, MAX_DIGITS = 3, 8

CAPITALS: dict[str, str] = {
    "france": "Paris", "germany": "Berlin", "spain": "Madrid", "italy": "Rome",
    "portugal": "Lisbon", "greece": "Athens", "austria": "Vienna", "hungary": "Budapest",
    "poland": "Warsaw", "norway": "Oslo", "sweden": "Stockholm", "finland": "Helsinki",
    "denmark": "Copenhagen", "iceland": "Reykjavik", "ireland": "Dublin", "belgium": "Brussels",
    "netherlands": "Amsterdam", "switzerland": "Bern", "romania": "Bucharest",
    "bulgaria": "Sofia", "croatia": "Zagreb", "serbia": "Belgrade", "albania": "Tirana",
    "estonia": "Tallinn", "latvia": "Riga", "lithuania": "Vilnius", "ukraine": "Kyiv",
    "russia": "Moscow", "turkey": "Ankara", "cyprus": "Nicosia", "japan": "Tokyo",
    "china": "Beijing", "india": "New Delhi", "nepal": "Kathmandu", "thailand": "Bangkok",
    "vietnam": "Hanoi", "indonesia": "Jakarta", "philippines": "Manila", "mongolia": "Ulaanbaatar",
    "bangladesh": "Dhaka", "pakistan": "Islamabad", "iran": "Tehran", "iraq": "Baghdad",
    "jordan": "Amman", "lebanon": "Beirut", "syria": "Damascus", "qatar": "Doha",
    "oman": "Muscat", "egypt": "Cairo", "morocco": "Rabat", "algeria": "Algiers",
    "tunisia": "Tunis", "libya": "Tripoli", "kenya": "Nairobi", "ethiopia": "Addis Ababa",
    "ghana": "Accra", "nigeria": "Abuja", "senegal": "Dakar", "uganda": "Kampala",
    "rwanda": "Kigali", "zambia": "Lusaka", "zimbabwe": "Harare", "angola": "Luanda",
    "canada": "Ottawa", "mexico": "Mexico City", "cuba": "Havana", "jamaica": "Kingston",
    "brazil": "Brasilia", "argentina": "Buenos Aires", "chile": "Santiago", "peru": "Lima",
    "ecuador": "Quito", "colombia": "Bogota", "venezuela": "Caracas", "uruguay": "Montevideo",
    "australia": "Canberra", "new zealand": "Wellington", "south korea": "Seoul",
    "czech republic": "Prague", "saudi arabia": "Riyadh",
}  # fmt: skip

# Plurals that the three suffix rules get wrong, or words that have none.
_IRREGULAR_WORDS = """
child deer fish moose salmon trout shrimp bison squid cod elk tooth foot police news music rice air
water traffic weather stomach elf tuna sherbet sheep ice wheat bacon butter garlic gravy popcorn
celery honey lightning wood glory fun smoke gas pliers
"""
_IRREGULAR = frozenset(_IRREGULAR_WORDS.split())

IRREGULAR_ENDINGS = ("o", "f", "fe", "z", "is")  # potatoes, leaves, quizzes, crises


def split_of(key: str) -> Split:
    """The split of an input key: 10 % test, 5 % dev, the rest train, decided by its SHA-256."""
    bucket = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") % 100
    return "test" if bucket < 10 else "dev" if bucket < 15 else "train"


def word_key(word: str) -> str:
    """Key of a word."""
    return f"word:{word}"


def digits_key(digits: str) -> str:
    """Key of a digit string or a number (the same characters are the same input)."""
    return f"digits:{digits}"


def pair_key(a: str, b: str) -> str:
    """Key of two summands, the same in either order, so that 27 + 45 does not leak 45 + 27."""
    low, high = sorted((int(a), int(b)))
    return f"pair:{low},{high}"


@cache
def nouns(split: Split) -> tuple[str, ...]:
    """The listed English nouns (``words.txt``) of 3 to 10 letters that fall in ``split``."""
    text = (Path(__file__).parent / "words.txt").read_text(encoding="utf-8")
    words = {w for line in text.splitlines() if not line.startswith("#") for w in line.split()}
    return tuple(
        w
        for w in sorted(words)
        if MIN_WORD <= len(w) <= MAX_WORD and split_of(word_key(w)) == split
    )


@cache
def regular_nouns(split: Split) -> tuple[str, ...]:
    """The nouns of ``split`` whose plural follows the -s, -es, -ies rules."""
    return tuple(
        w for w in nouns(split) if w not in _IRREGULAR and not w.endswith(IRREGULAR_ENDINGS)
    )


def until(draw: Callable[[], str], split: Split, key: Callable[[str], str] = word_key) -> str:
    """The first result of ``draw`` whose key falls in ``split``."""
    while split_of(key(value := draw())) != split:
        pass
    return value


def pseudo_word(rng: random.Random, split: Split, low: int = MIN_WORD, high: int = MAX_WORD) -> str:
    """A made-up word of ``low`` to ``high`` letters in ``split``."""
    letters = _ENGLISH if rng.random() < 0.5 else LETTERS
    return until(lambda: "".join(rng.choices(letters, k=rng.randint(low, high))), split)


def word(rng: random.Random, split: Split, real: float = 0.5) -> str:
    """A listed noun with probability ``real``, else a made-up word."""
    return rng.choice(nouns(split)) if rng.random() < real else pseudo_word(rng, split)


def digits(rng: random.Random, split: Split) -> str:
    """A string of 3 to 8 digits, any of which may be zero."""

    def draw() -> str:
        return "".join(rng.choices("0123456789", k=rng.randint(MIN_DIGITS, MAX_DIGITS)))

    return until(draw, split, digits_key)


def number(rng: random.Random, split: Split) -> str:
    """A number from 0 to 9999 without leading zeros; short ones are drawn more often."""

    def draw() -> str:
        return str(rng.randrange(10 ** rng.choices((1, 2, 3, 4), (1, 3, 5, 5))[0]))

    return until(draw, split, digits_key)


def pair(rng: random.Random, split: Split) -> tuple[str, str]:
    """Two numbers from 0 to 99."""
    while True:
        a, b = (str(rng.randrange(10 if rng.random() < 0.15 else 100)) for _ in range(2))
        if split_of(pair_key(a, b)) == split:
            return a, b


def letter_and_word(rng: random.Random, split: Split) -> tuple[str, str]:
    """A letter and a word that holds it 0 to 4 times.

    Ordinary words rarely repeat a letter, so where a word has no letter that occurs often enough,
    copies are planted in it; otherwise "always 1" would score well.
    """
    while True:
        text = word(rng, split)
        wanted = rng.choices(range(5), (12, 30, 30, 20, 8))[0]
        if wanted == 0:
            letter = rng.choice([c for c in LETTERS if c not in text])
            return letter, text
        fitting = [c for c in text if text.count(c) == wanted]
        letter = rng.choice(fitting or text)
        others = [i for i, c in enumerate(text) if c != letter]
        missing = wanted - text.count(letter)
        if 0 <= missing <= len(others):
            spots = rng.sample(others, k=missing)
            text = "".join(letter if i in spots else c for i, c in enumerate(text))
            if split_of(word_key(text)) == split:
                return letter, text


def country(rng: random.Random) -> str:
    """A country of the fact table; there is no held-out part, since facts cannot be generalised."""
    return rng.choice(sorted(CAPITALS))
