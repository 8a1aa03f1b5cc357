"""NAME=VALUE on a command line: what becomes of the value, and what is refused."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from composer.assignments import assigned


@given(st.dictionaries(st.text("abc_", min_size=1), st.one_of(st.integers(), st.text("xyz ="))))
def test_names_have_their_values_back(values: dict[str, int | str]) -> None:
    assert assigned(f"{name}={json.dumps(value)}" for name, value in values.items()) == values


def test_what_is_no_json_stands_as_it_is() -> None:
    assert assigned(["kind=ties", "where=a=b", "rank=4", "rank=8"]) == {
        "kind": "ties",
        "where": "a=b",
        "rank": 8,
    }


@pytest.mark.parametrize("word", ["rank", "=4", ""])
def test_a_word_without_name_or_sign_is_refused(word: str) -> None:
    with pytest.raises(ValueError, match="is not NAME=VALUE; write it so"):
        assigned([word])
