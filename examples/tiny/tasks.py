"""The skills as pure functions: inputs, canonical prompts, answers, and two-segment composites.

A *canonical prompt* is what a tiny model reads, an instruction word and the input:
``uppercase fox``. A *wording* is what a person writes: ``can you make this uppercase: fox``.
A *composite* joins two canonical prompts, and their answers, with `` ; ``:
``uppercase fox ; sort 3142`` gives ``FOX ; 1234``.

Knows nothing about models. Inputs and their splits come from `examples.tiny.inputs`.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import permutations
from typing import Literal

from examples.tiny import inputs
from examples.tiny.inputs import CAPITALS, VOWELS, Split

Fields = dict[str, str]
SEPARATOR = " ; "

_ONE_WORDS = """
zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen
sixteen seventeen eighteen nineteen
"""
_ONES = _ONE_WORDS.split()
_TENS = [
    "zero", "ten", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety",
]  # fmt: skip


def uppercase(word: str) -> str:
    """fox → FOX."""
    return word.upper()


def sort_digits(digits: str) -> str:
    """3142 → 1234."""
    return "".join(sorted(digits))


def reverse(word: str) -> str:
    """fox → xof."""
    return word[::-1]


def add(a: str, b: str) -> str:
    """27, 45 → 72."""
    return str(int(a) + int(b))


def count_letter(letter: str, word: str) -> str:
    """r, strawberry → 3."""
    return str(word.count(letter))


def caesar(word: str, shift: int = 3) -> str:
    """fox → ira: each letter moves ``shift`` places on, z going round to a."""
    return "".join(chr((ord(c) - 97 + shift) % 26 + 97) for c in word)


def spell_number(number: str) -> str:
    """342 → three hundred forty two (no hyphens, no "and"); 0 to 9999."""
    n, parts = int(number), []
    if n >= 1000:
        parts += [_ONES[n // 1000], "thousand"]
    if n % 1000 >= 100:
        parts += [_ONES[n % 1000 // 100], "hundred"]
    rest = n % 100
    if rest >= 20:
        parts += [_TENS[rest // 10]] + ([_ONES[rest % 10]] if rest % 10 else [])
    elif rest or not parts:
        parts.append(_ONES[rest])
    return " ".join(parts)


def plural(word: str) -> str:
    """fox → foxes, city → cities, dog → dogs: the three regular suffix rules."""
    if word.endswith(("s", "x", "z", "ch", "sh")):
        return word + "es"
    if word.endswith("y") and word[-2] not in VOWELS:
        return word[:-1] + "ies"
    return word + "s"


def drop_vowels(word: str) -> str:
    """planet → plnt: a, e, i, o and u are left out; y stays."""
    return "".join(c for c in word if c not in VOWELS)


def capital(country: str) -> str:
    """france → Paris."""
    return CAPITALS[country]


@dataclass(frozen=True)
class Item:
    """One question: the skill's id, its fields, the canonical prompt and the right answer."""

    skill: str
    fields: Fields
    prompt: str
    answer: str

    def wording(self, template: str) -> str:
        """``template`` with its placeholders filled, e.g. ``"what is {a} + {b}?"``.

        Raises:
            KeyError: the template names a field that this skill does not have.
        """
        return template.format(**self.fields)


@dataclass(frozen=True)
class Skill:
    """A skill: how its inputs are drawn, how they are written, and what the answer is.

    Attributes:
        id: the expert's name, e.g. ``sort-digits``.
        instruction: the word that starts the canonical prompt; one token of the tokenizer.
        template: the canonical prompt with placeholders.
        kind: the type of input; skills of one kind can be asked of the same input.
        draw: draws the fields of one input that falls in a split.
        solve: the answer for given fields.
        memory: true for a fact table, which has no held-out inputs: every split is the table.
    """

    id: str
    instruction: str
    template: str
    kind: Literal["word", "digits", "pair", "letter", "country"]
    description: str
    labels: tuple[str, ...]
    draw: Callable[[random.Random, Split], Fields]
    solve: Callable[..., str]
    memory: bool = False

    def item(self, fields: Fields) -> Item:
        """The question that ``fields`` make."""
        return Item(self.id, fields, self.template.format(**fields), self.solve(**fields))

    def sample(self, split: Split, n: int, seed: int) -> list[Item]:
        """``n`` items whose inputs fall in ``split``, distinct while the split has enough.

        The same arguments always give the same items. A fact table gives its facts in a
        shuffled order, at most once each, whatever the split.
        """
        rng = random.Random(f"{self.id}/{split}/{seed}")
        if self.memory:
            facts = [self.item({"country": c}) for c in sorted(CAPITALS)]
            return rng.sample(facts, k=min(n, len(facts)))
        items: dict[str, Item] = {}
        for _ in range(20 * n):  # bounded: a small split may not hold n different inputs
            item = self.item(self.draw(rng, split))
            items.setdefault(item.prompt, item)
            if len(items) == n:
                break
        return list(items.values())


def _word(rng: random.Random, split: Split) -> Fields:
    return {"word": inputs.word(rng, split)}


def _noun(rng: random.Random, split: Split) -> Fields:
    if rng.random() < 0.6:
        return {"word": rng.choice(inputs.regular_nouns(split))}

    # Made-up stems keep the suffix rules from being learned as a list, and the rare endings
    # (-x, -ch, -sh, consonant + y) are drawn as often as the plain ones.
    def draw() -> str:
        stem = "".join(rng.choices(inputs.LETTERS, k=rng.randint(3, 7)))
        return stem + rng.choice(("x", "ch", "sh", "s", "y", "ly", "ry", "ay", "ey", "", "e", "t"))

    while (word := inputs.until(draw, split)).endswith(inputs.IRREGULAR_ENDINGS):
        pass
    return {"word": word}


def _pair(rng: random.Random, split: Split) -> Fields:
    a, b = inputs.pair(rng, split)
    return {"a": a, "b": b}


def _letter(rng: random.Random, split: Split) -> Fields:
    letter, word = inputs.letter_and_word(rng, split)
    return {"letter": letter, "word": word}


_SKILLS = (
    Skill(
        "uppercase", "uppercase", "uppercase {word}", "word",
        "Writes a word in capital letters.",
        ("uppercase", "capital letters", "letter case"), _word, uppercase,
    ),
    Skill(
        "sort-digits", "sort", "sort {digits}", "digits",
        "Puts the digits of a string in ascending order.",
        ("sorting", "digits", "ascending order"),
        lambda rng, split: {"digits": inputs.digits(rng, split)}, sort_digits,
    ),
    Skill(
        "reverse", "reverse", "reverse {word}", "word",
        "Writes a word backwards.",
        ("reversing", "backwards", "mirror spelling"), _word, reverse,
    ),
    Skill(
        "add", "add", "add {a} {b}", "pair",
        "Adds two whole numbers of up to two digits.",
        ("addition", "sum", "arithmetic"), _pair, add,
    ),
    Skill(
        "count-letter", "count", "count {letter} {word}", "letter",
        "Counts how often a letter occurs in a word.",
        ("counting letters", "letter frequency"), _letter, count_letter,
    ),
    Skill(
        "caesar", "caesar", "caesar {word}", "word",
        "Enciphers a word with a Caesar shift of three letters.",
        ("caesar cipher", "encryption", "letter shift"), _word, caesar,
    ),
    Skill(
        "spell-number", "spell", "spell {number}", "digits",
        "Spells out a number from 0 to 9999 in English words.",
        ("number words", "spelling out numbers"),
        lambda rng, split: {"number": inputs.number(rng, split)}, spell_number,
    ),
    Skill(
        "plural", "plural", "plural {word}", "word",
        "Gives the regular English plural of a noun.",
        ("plural", "grammar", "nouns"), _noun, plural,
    ),
    Skill(
        "drop-vowels", "devowel", "devowel {word}", "word",
        "Removes the vowels from a word.",
        ("removing vowels", "disemvowelling", "consonants"), _word, drop_vowels,
    ),
    Skill(
        "capital", "capital", "capital {country}", "country",
        "Names the capital city of a country.",
        ("capital cities", "geography", "facts"),
        lambda rng, split: {"country": inputs.country(rng)}, capital, memory=True,
    ),
)  # fmt: skip
SKILLS: dict[str, Skill] = {skill.id: skill for skill in _SKILLS}
INSTRUCTIONS: tuple[str, ...] = tuple(skill.instruction for skill in _SKILLS)

PairSet = Literal["seen", "unseen", "all"]


@dataclass(frozen=True)
class CompositeItem:
    """Two questions in one prompt, answered in their order, both joined with `` ; ``."""

    parts: tuple[Item, Item]

    @property
    def prompt(self) -> str:
        """E.g. ``uppercase fox ; sort 3142``."""
        return SEPARATOR.join(part.prompt for part in self.parts)

    @property
    def answer(self) -> str:
        """E.g. ``FOX ; 1234``."""
        return SEPARATOR.join(part.answer for part in self.parts)

    def right_parts(self, text: str) -> tuple[bool, bool]:
        """Which of the two segments of a model's ``text`` are right."""
        first, _, second = text.partition(SEPARATOR)
        return first == self.parts[0].answer, second == self.parts[1].answer


def composite_pairs(which: PairSet = "all") -> tuple[tuple[str, str], ...]:
    """Ordered pairs of different skills; about a fifth, chosen by hash, are ``unseen``.

    Whoever trains a mixture of adapters on composites trains on ``seen`` pairs and is judged on
    ``unseen`` ones too: does it mix skills it never met together?
    """

    def unseen(pair: tuple[str, str]) -> bool:
        return hashlib.sha256("+".join(pair).encode()).digest()[0] % 5 == 0

    pairs = tuple(permutations(SKILLS, 2))
    return pairs if which == "all" else tuple(p for p in pairs if unseen(p) == (which == "unseen"))


def sample_composites(
    split: Split, n: int, seed: int, pairs: tuple[tuple[str, str], ...] | None = None
) -> list[CompositeItem]:
    """``n`` composites, the skill pairs taken in turn, both inputs from ``split``.

    Args:
        pairs: ordered pairs of skill ids; all pairs when None.

    Raises:
        ValueError: ``pairs`` is empty.
        KeyError: a pair names an unknown skill.
    """
    pairs = composite_pairs() if pairs is None else pairs
    if not pairs:
        raise ValueError(
            "no skill pairs given: pass at least one, e.g. (('uppercase', 'reverse'),)"
        )
    rng = random.Random(f"composite/{split}/{seed}")
    items = []
    for i in range(n):
        first, second = (SKILLS[name] for name in pairs[i % len(pairs)])
        items.append(
            CompositeItem(
                (first.item(first.draw(rng, split)), second.item(second.draw(rng, split)))
            )
        )
    return items
