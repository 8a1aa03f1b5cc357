"""Extractors on the ways answers are really written."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from composer.strategies.extract import EXTRACTORS, make_extractor


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("exact", "  Foo\n bar ", "foo bar"),
        ("exact", " \n", None),
        ("number", "The answer is 42.", "42"),
        ("number", "so 3 + 4 = 7.00", "7"),
        ("number", "$1,234.50 in all", "1234.5"),
        ("number", "1000", "1000"),
        ("number", "from 3-5", "5"),
        ("number", "it fell to -3", "-3"),
        ("number", "-0.0", "0"),
        ("number", ".5", "0.5"),
        ("number", "none at all", None),
        ("number", "version v2", None),
        ("choice", "The answer is (C).", "C"),
        ("choice", "Answer: b", None),
        ("choice", "**Answer: B**", "B"),
        ("choice", "First I thought the answer is A, but the answer is D", "D"),
        ("choice", "C. because it is so", "C"),
        ("choice", "(B)", "B"),
        ("choice", "b", "B"),
        ("choice", "It must be (A) or rather (E)", "E"),
        ("choice", "I think so", None),
        ("choice", "I'm not sure", None),
        ("choice", "The answer is I think unclear", None),
        ("choice", "A dog", None),
        ("literal", " 'Ab  c' ", "Ab  c"),
        ("literal", "[1, 'x']", "[1, 'x']"),
        ("literal", "''", ""),
        ("literal", "'", "'"),
        ("literal", "'a\"", "'a\""),
        ("literal", " \n", None),
    ],
)
def test_found(name: str, text: str, found: str | None) -> None:
    assert make_extractor(name, None)(text) == found


def test_regex_takes_the_last_match_and_its_first_group() -> None:
    assert make_extractor("regex", r"#(\w+)")("#One then #Two") == "two"
    assert make_extractor("regex", r"\d{4}")("in 1999 or 2004") == "2004"
    assert make_extractor("regex", r"\d{4}")("never") is None
    assert make_extractor("regex", r"a|(b)")("a") is None


@pytest.mark.parametrize(
    ("name", "pattern", "message"),
    [
        ("regex", None, "needs a pattern"),
        ("regex", "(", "is not a regular expression"),
        ("number", "x", "takes no pattern"),
        ("words", None, "known are exact, number, choice, literal, regex"),
    ],
)
def test_wrong_settings_name_the_remedy(name: str, pattern: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_extractor(name, pattern)


@given(st.text())
def test_no_text_breaks_an_extractor(text: str) -> None:
    for extract in EXTRACTORS.values():
        found = extract(text)
        assert found is None or found


@given(
    st.decimals(
        allow_nan=False, allow_infinity=False, places=3, min_value=-(10**9), max_value=10**9
    )
)
def test_a_number_is_found_however_it_is_written(value: object) -> None:
    extract = EXTRACTORS["number"]
    assert extract(f"= {value}") == extract(f"it is {value:,} units")
