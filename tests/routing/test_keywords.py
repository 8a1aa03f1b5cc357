"""An LLM's words for skills: what is read, and what is kept."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from composer.routing.keywords import MAX_CHARS, PROMPT, agreed, keywords_of


def test_lists_of_any_shape_are_read() -> None:
    assert keywords_of("Algebra, number theory,\n Algebra.") == ("algebra", "number theory")
    assert keywords_of("Skills: algebra; logic") == ("algebra", "logic")
    assert keywords_of("1. Algebra\n2) **Logic**\n- 'sets'\n• graphs") == (
        "algebra",
        "logic",
        "sets",
        "graphs",
    )
    assert keywords_of("") == keywords_of("42, —") == ()


def test_what_is_over_twenty_characters_is_dropped() -> None:
    assert keywords_of(f"{'x' * 20}, {'y' * 21}") == ("x" * 20,)


def test_what_one_sample_alone_says_is_dropped() -> None:
    said = ["algebra, logic", "logic, poetry", "logic, algebra, sets"]
    assert agreed(said) == ("logic", "algebra")
    assert agreed(["algebra, algebra", "poetry"]) == ()  # twice in one sample is once
    assert agreed(["algebra, logic"]) == ("algebra", "logic")
    assert agreed([]) == ()


def test_the_question_stands_in_the_prompt_as_it_is() -> None:
    assert "{x}" in PROMPT.format(text="{x}")


@given(st.lists(st.text(), min_size=2, max_size=6))
def test_what_is_kept_was_said_twice(said: list[str]) -> None:
    every = [keywords_of(one) for one in said]
    for word in agreed(said):
        assert sum(word in words for words in every) >= 2
        assert len(word) <= MAX_CHARS
        assert word == word.lower()
