"""Scorers on tables of cases."""

from __future__ import annotations

import time
from collections.abc import Sequence

import pytest

from composer.types import Message
from router_training.asking import Said
from router_training.errors import TrainingError
from router_training.judging import Judge, read_grade, read_preference
from router_training.numerals import numeral
from router_training.scorers import NAMES, code_of, make_scorer
from router_training.scoring import Choice, Exact, Example, Numeric, Regex


@pytest.mark.parametrize(
    ("answer", "gold", "score"),
    [
        ("Paris", "Paris", 1),
        ("  paris \n", "Paris", 1),
        ("New  York", "new york", 1),
        ("Paris, France", "Paris", 0),
        ("", "Paris", 0),
        ("STRASSE", "straße", 1),
    ],
)
async def test_exact(answer: str, gold: str, score: float) -> None:
    assert await Exact()(answer, Example("q", gold)) == score


@pytest.mark.parametrize(
    ("answer", "gold", "score"),
    [
        ("42", "42", 1),
        ("The total is $1,234.50.", "1234.5", 1),
        ("1\u202f234\u202f567", "1234567", 1),
        ("2\\frac{1}{2}", "2.5", 1),
        ("so 3 + 4 = 7", "7", 1),
        ("12 apples, 5 pears.\n#### 17", "17", 1),
        ("#### 17\nThat is 12 plus 5.", "17", 1),
        ("The answer is 5, not 7.", "5", 1),
        ("**Answer:** 12 of 30", "12", 1),
        ("The answer is clear.\nIt is 9", "9", 1),
        ("3/4", "0.75", 1),
        ("\\boxed{\\frac{3}{4}}", "0.75", 1),
        ("$\\boxed{-\\dfrac{1}{3}}$ as 1 < 2", "-1/3", 1),
        ("\\frac12", "0.5", 1),
        ("1 1/2 cups", "1.5", 1),
        ("\\boxed{x = 1{,}000}", "1000", 1),
        ("\\boxed{10\\,000}", "10000", 1),
        ("\\boxed{5 \\text{ cm}}", "5", 1),
        ("first \\boxed{1}, then \\boxed{2}", "2", 1),
        ("\\boxed{nothing} though 7", "7", 0),
        ("1.2e-3", "0.0012", 1),
        ("1.2 \\times 10^{-3}", "0.0012", 1),
        ("3 × 10^5", "300000", 1),
        ("50%", "50", 1),
        ("50 %", "0.5", 1),
        ("0.5", "50%", 1),
        ("5%", "50%", 0),
        ("−3", "-3", 1),
        ("5 - 3 = 2", "2", 1),
        ("in 2020-2021", "2021", 1),
        ("-$5", "-5", 1),
        ("7.0000001", "7", 1),
        ("7.01", "7", 0),
        ("seven", "7", 0),
        ("x1", "1", 0),
        ("1/0", "1", 0),
        ("0.00001", "0", 0),
    ],
)
async def test_numeric(answer: str, gold: str, score: float) -> None:
    scorer = Numeric()
    assert scorer.lack(Example("q", gold)) is None
    assert await scorer(answer, Example("q", gold)) == score


async def test_tolerance_is_relative() -> None:
    for answer, score in (("101", 1), ("99", 1), ("102", 0)):
        assert await Numeric(0.01)(answer, Example("q", "100")) == score


def test_a_long_answer_takes_no_time() -> None:
    began = time.process_time()
    for text in ("1" * 50_000, "1 " * 25_000, "1," * 25_000, "\\boxed{" * 10_000, "1/" * 25_000):
        numeral(text)
    assert time.process_time() - began < 20  # quadratic would be minutes


@pytest.mark.parametrize(
    ("answer", "gold", "score"),
    [
        ("C", "C", 1),
        ("The answer is (C) because B is wrong.", "C", 1),
        ("c", "(C)", 1),
        ("It is B", "C", 0),
        ("Paris", "C", 1),
        ("I do not know", "A", 0),
        ("C", "paris", 1),
    ],
)
async def test_choice(answer: str, gold: str, score: float) -> None:
    example = Example("q", gold, ("Rome", "Bern", "Paris"))
    assert Choice().lack(example) is None
    assert await Choice()(answer, example) == score


@pytest.mark.parametrize(
    ("pattern", "answer", "gold", "score"),
    [
        (r"result: (\w+)", "result: yes, no, result: NO", "no", 1),
        (r"result: (\w+)", "no", "no", 0),
        (r"\d+", "1 2 3", "3", 1),
        (None, "a cat sat", r"\bcat\b", 1),
        (None, "concatenate", r"\bcat\b", 0),
    ],
)
async def test_regex(pattern: str | None, answer: str, gold: str, score: float) -> None:
    assert await Regex(pattern)(answer, Example("q", gold)) == score


async def test_endless_backtracking_is_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router_training.scoring.SEARCH_S", 0.05)
    assert await Regex(r"(.*)(.*)(.*)[xy]$")("a" * 5000, Example("q", "b")) is None


@pytest.mark.parametrize(
    ("scorer", "gold", "column", "words"),
    [
        (Exact(), None, "gold", "there is nothing"),
        (Exact(), "  ", "gold", "there is nothing"),
        (Numeric(), "seven", "gold", "'seven' is no number"),
        (Choice(), "none of them", "gold", "neither a letter nor"),
        (Regex(), "(", "gold", "not a regular expression"),
    ],
)
def test_what_cannot_be_scored_is_told_before(
    scorer: Exact, gold: str | None, column: str, words: str
) -> None:
    lack = scorer.lack(Example("q", gold))
    assert lack is not None
    assert lack.column == column
    assert words in lack.message


# --- judges ------------------------------------------------------------------------------


class Says:
    """A judge that says one thing after the other."""

    def __init__(self, *verdicts: str) -> None:
        self.verdicts = list(verdicts)
        self.asked: list[str] = []

    async def __call__(self, expert: str, messages: Sequence[Message]) -> Said:
        assert expert == "grader"
        self.asked.append(str(messages[0]["content"]))
        return Said(self.verdicts.pop(0))


@pytest.mark.parametrize(
    ("verdict", "score"),
    [
        ("Fine. [[8]]", 0.8),
        ("[[3]] no, better: [[ 7.5 ]]", 0.75),
        ("[[10/10]]", 1.0),
        ("[[0]]", 0.0),
        ("[[11]]", None),
        ("8 of 10", None),
        ("", None),
    ],
)
async def test_grades(verdict: str, score: float | None) -> None:
    assert read_grade(verdict) == score
    judge = Says(verdict)
    assert await Judge(judge, "grader")("{gold} or 5", Example("How {many}?", "5")) == score
    [prompt] = judge.asked
    for part in ("How {many}?", "<correct_answer>\n5\n", "<answer>\n{gold} or 5\n"):
        assert part in prompt


async def test_grades_without_a_right_answer() -> None:
    judge = Says("[[4]]")
    assert await Judge(judge, "grader")("5", Example("How many?")) == 0.4
    assert "correct_answer" not in judge.asked[0]


@pytest.mark.parametrize(
    ("first", "second", "score"),
    [
        ("[[A]]", "[[B]]", 1.0),
        ("[[B]]", "[[A]]", 0.0),
        ("[[A]]", "[[A]]", 0.5),  # a judge that favours a place says nothing
        ("[[C]]", "[[B]]", 0.75),
        ("[[C]]", "[[C]]", 0.5),
        ("[[A]]", "B", None),
    ],
)
async def test_pairs_in_both_orders(first: str, second: str, score: float | None) -> None:
    judge = Says(first, second)
    assert await Judge(judge, "grader", "pair")("ours", Example("q", "theirs")) == score
    assert "<answer_a>\nours\n" in judge.asked[0]
    assert "<answer_b>\nours\n" in judge.asked[1]


def test_preferences() -> None:
    assert read_preference("[[A]] at first, then [[B]]") == "B"
    assert read_preference("A") is None


# --- by name -----------------------------------------------------------------------------


def test_scorers_by_name_and_what_is_wrong_with_settings() -> None:
    for name in ("exact", "regex", "numeric", "choice"):
        assert make_scorer(name).needs == "gold"
    assert make_scorer("judge", ask=Says(), judge="grader").needs is None
    assert make_scorer("judge", ask=Says(), judge="grader", mode="pair").needs == "gold"
    assert set(NAMES) == {"exact", "regex", "numeric", "choice", "judge", "code"}
    for settings, words in (
        ({"name": "bleu"}, "there is no scorer 'bleu'; there are: exact,"),
        ({"name": "exact", "pattern": "x"}, "takes no --pattern"),
        ({"name": "regex", "pattern": "("}, "not a regular expression"),
        ({"name": "judge"}, "add --judge EXPERT"),
        ({"name": "code"}, "add --allow-code"),
    ):
        with pytest.raises(TrainingError, match=words):
            make_scorer(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ("So:\n```python\ndef f():\n  pass\n```\nUse:\n```\nf()\n```", "def f():\n  pass\n"),
        ("```py\nx = 1\n", "x = 1\n"),
        ("```bash\npip install it and more of it\n```\n```\nx = 1\n```", "x = 1\n"),
        ("def f(): return 1", "def f(): return 1"),
        ("```python\ndef f(:\n```", None),
        ("I cannot do that.", None),
        ("", None),
    ],
)  # fmt: skip
def test_code_in_an_answer(answer: str, code: str | None) -> None:
    assert code_of(answer) == code
