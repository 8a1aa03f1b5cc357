"""Answer options, format features and words read off texts."""

from __future__ import annotations

import csv
import gzip
from pathlib import Path

import numpy as np
import pytest

from composer.routing import reading
from composer.routing.reading import FORMAT, MAX_CHARS, measured, read, words_of

DATA = Path(__file__).parents[3] / "shared" / "data"


@pytest.mark.parametrize(
    ("text", "stem", "options"),
    [
        ("Which?\nA. one\nB. two\nC. three", "Which?", ("one", "two", "three")),
        ("Which?\n(A) one\n(B) two", "Which?", ("one", "two")),
        ("Which?\n  A) one\n  B) two", "Which?", ("one", "two")),
        ("Which? A) one B) two C) three", "Which?", ("one", "two", "three")),
        ("Which? (A) one (B) two", "Which?", ("one", "two")),
        ("Which?\nA: one\nB: two\nAnswer:", "Which?", ("one", "two\nAnswer:")),
        ("Which?\nA. one\nmore of it\nB. two", "Which?", ("one\nmore of it", "two")),
        # No list: one letter alone, another style, initials within a line, letters out of order.
        ("Which?\nA. one", None, ()),
        ("Which?\nA. one\n(B) two", None, ()),
        ("A letter by A. Smith and B. Jones", None, ()),
        ("Which?\nB. two\nA. one", None, ()),
        ("def f(A): return A", None, ()),
        ("", None, ()),
        # A list that nothing stands before is not parted from its question.
        ("A. one\nB. two", None, ("one", "two")),
    ],
)
def test_options_are_told_from_the_question(
    text: str, stem: str | None, options: tuple[str, ...]
) -> None:
    reading = read(text)
    assert reading.options == options
    assert reading.stem == (text if stem is None else stem)


def test_a_false_start_does_not_hide_the_list() -> None:
    reading = read("A. Smith wrote this.\nWhich?\nA. one\nB. two")
    assert "two" in reading.options


@pytest.mark.parametrize("mark", ["A) x ", "A. \n", "(A) \n"])
def test_letters_without_a_list_are_looked_behind_once(
    mark: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked = []
    marks = reading._marks
    monkeypatch.setattr(reading, "_marks", lambda *given: looked.append(1) or marks(*given))
    assert read(mark * 4000).options == ()
    assert len(looked) <= 2  # one for each way to write lists


def test_long_texts_are_cut() -> None:
    assert len(read("x" * 3 * MAX_CHARS).stem) == MAX_CHARS


def test_words_and_pairs() -> None:
    assert words_of("The 3 cats, 12345!") == [
        "the", "0", "cats", ",", "0000", "!",
        "the 0", "0 cats", "cats ,", ", 0000", "0000 !",
    ]  # fmt: skip
    assert words_of("\\frac été") == ["\\frac", "été", "\\frac été"]
    assert words_of(" \n ") == []


def test_every_format_feature_is_finite_and_can_differ() -> None:
    texts = [
        "", "?", "Why is x_1 = 3.14?\nA. a. \nB. B 2\nC. B 2", "def f(a):\n\treturn a**2 # é",
        "Which of the following statements is NOT true, except all of the above? $\\pi$ ____",
        "Calculate, find, determine how many, how much: write a function; assert suppose consider",
        "what is the best? who, according to whom, most likely, python; prove: always false if not",
        "none of the above", "lower (case) 'quotes' 1,000,000.", "A) 1 B) 2 is it not fine",
        "it is not so. consider which of the following is best\nA. some long option here.\nB. no.",
    ]  # fmt: skip
    rows = measured([read(text) for text in texts])
    assert rows.shape == (len(texts), len(FORMAT))
    assert np.isfinite(rows).all()
    still = [name for (name, _), spread in zip(FORMAT, rows.std(axis=0), strict=True) if not spread]
    assert still == []
    assert len({name for name, _ in FORMAT}) == len(FORMAT)


@pytest.mark.skipif(not DATA.exists(), reason="the shared data is not beside the checkout")
def test_every_question_with_options_in_the_shared_data_is_recognised() -> None:
    csv.field_size_limit(10**8)
    with gzip.open(DATA / "mmlu_pro.dev.csv.gz", "rt", encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            reading = read(row["query"])
            assert len(reading.options) >= 2
            assert reading.stem == row["query"].partition("\nA. ")[0].rstrip() or (
                len(reading.stem) < len(row["query"])
            )
