"""The bases' pre-training text: the algorithms without the skills.

Each example is a canonical prompt whose instruction word says nothing: the answer is that of a
task drawn at random among those that fit the input, so the base learns *how* to sort, reverse
or add but not *when*; a rank-8 adapter then has only to select and sharpen. One example in ten
is a composite of two segments, each with its own random task.

Pre-training ends with a short second stage in which copying the input is made the commonest task
of every kind, so that copying is what the base does by default and its greedy answer to a skill's
prompt is rarely right.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from examples.tiny import inputs, tasks
from examples.tiny.inputs import Split
from examples.tiny.tasks import INSTRUCTIONS, SEPARATOR

Solve = Callable[..., str]


@dataclass(frozen=True)
class Kind:
    """A type of input: its share of the text, how it is drawn, its tasks by weight.

    The first task copies the input.
    """

    share: float
    draw: Callable[[random.Random, Split], tuple[str, ...]]
    tasks: tuple[tuple[float, Solve], ...]

    def any_task(self, rng: random.Random, copying: float = 1.0) -> Solve:
        """A task drawn by weight, that of copying multiplied by ``copying``."""
        weights = [weight for weight, _ in self.tasks]
        weights[0] *= copying
        return rng.choices([task for _, task in self.tasks], weights)[0]


def _difference(a: str, b: str) -> str:
    return str(abs(int(a) - int(b)))


def _position(letter: str, word: str) -> str:
    return str(word.find(letter) + 1)


KINDS: dict[str, Kind] = {
    "word": Kind(
        0.44,
        lambda rng, split: (
            (inputs.word(rng, split),)
            if rng.random() < 0.75
            else (tasks.SKILLS["plural"].draw(rng, split)["word"],)
        ),
        (
            (0.24, str),
            (0.18, tasks.reverse),
            (0.12, tasks.caesar),
            (0.09, tasks.uppercase),
            (0.13, tasks.drop_vowels),
            (0.10, tasks.plural),
            (0.05, str.title),
            (0.03, lambda w: str(len(w))),
            (0.03, lambda w: w[0]),
            (0.03, lambda w: w[-1]),
        ),
    ),
    "digits": Kind(
        0.14,
        lambda rng, split: (inputs.digits(rng, split),),
        (
            (0.30, str),
            (0.40, tasks.sort_digits),
            (0.15, lambda d: "".join(sorted(d, reverse=True))),
            (0.15, tasks.reverse),
        ),
    ),
    "number": Kind(
        0.10,
        lambda rng, split: (inputs.number(rng, split),),
        ((0.35, str), (0.50, tasks.spell_number), (0.15, tasks.reverse)),
    ),
    "pair": Kind(
        0.16,
        inputs.pair,
        (
            (0.25, lambda a, b: f"{a} {b}"),
            (0.45, tasks.add),
            (0.10, _difference),
            (0.10, lambda a, b: str(max(int(a), int(b)))),
            (0.10, lambda a, b: f"{b} {a}"),
        ),
    ),
    "letter": Kind(
        0.13,
        inputs.letter_and_word,
        (
            (0.30, lambda letter, word: f"{letter} {word}"),
            (0.45, tasks.count_letter),
            (0.15, _position),
            (0.10, lambda letter, word: word),
        ),
    ),
    "country": Kind(
        0.03,
        lambda rng, split: (inputs.country(rng),),
        ((0.5, str), (0.2, str.title), (0.2, tasks.reverse), (0.1, lambda c: c[0])),
    ),
}
COMPOSITE_SHARE = 0.1


def any_kind(rng: random.Random) -> Kind:
    """A type of input drawn by its share."""
    return rng.choices(list(KINDS.values()), [k.share for k in KINDS.values()])[0]


def _segment(rng: random.Random, split: Split, copying: float) -> tuple[str, str]:
    kind = any_kind(rng)
    fields = kind.draw(rng, split)
    solve = kind.any_task(rng, copying)
    return f"{rng.choice(INSTRUCTIONS)} {' '.join(fields)}", solve(*fields)


def example(rng: random.Random, split: Split = "train", copying: float = 1.0) -> tuple[str, str]:
    """One (prompt, answer) of the pre-training text.

    Args:
        copying: factor on the weight of copying; 1 in the first stage, more in the second.
    """
    n = 2 if rng.random() < COMPOSITE_SHARE else 1
    segments = [_segment(rng, split, copying) for _ in range(n)]
    prompts, answers = zip(*segments, strict=True)
    return SEPARATOR.join(prompts), SEPARATOR.join(answers)
