"""A record survives the journal's form, whatever text is in it."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from composer.errors import RequestError
from composer.store.records import Feedback, Record, clean_text, decode, encode, to_json
from tests.store.records import NOON, failed_record, full_record, make_record, records


@given(records)
def test_encode_and_decode_are_inverse_but_for_nul(record: Record) -> None:
    data = encode(record)
    assert b"\n" not in data
    assert b"\\u0000" not in data
    if b"\\ufffd" not in data and "\ufffd" not in data.decode():
        assert decode(data) == record


def test_a_full_and_a_failed_record_survive() -> None:
    for record in (full_record("a"), failed_record("b")):
        again = decode(encode(record))
        assert again == record
        assert isinstance(again, Record)
        np.testing.assert_array_equal(again.query_embedding, record.query_embedding)


def test_feedback_survives() -> None:
    item = Feedback.checked("r", 1, comment="good", labels={"tone": ["kind"]})
    assert decode(encode(item)) == item
    assert item.id.startswith("fb-")


def test_fields_added_later_take_their_defaults_and_unknown_ones_are_refused() -> None:
    record = make_record("a", stream=True)
    older = encode(record).replace(b'"stream":true,', b"")
    assert decode(older) == make_record("a", stream=False)
    newer = encode(record).replace(b'"stream":true,', b'"stream":true,"colour":"red",')
    with pytest.raises(ValueError, match="colour"):
        decode(newer)


@pytest.mark.parametrize(
    "line",
    [b"", b"{}", b"[]", b'"x"', b"{", b'{"kind":"plan","entry":{"created":"2026-01-02"}}',
     encode(make_record("a")).replace(b'"ok"', b'"fine"')],
)  # fmt: skip
def test_what_is_no_entry_is_a_value_error(line: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        decode(line)


def test_json_mends_what_postgresql_cannot_hold() -> None:
    value = {"a\x00": ["\ud800", float("nan")], "b": MappingProxyType({"c": {"z", "y"}})}
    assert to_json(value) == '{"a�":["�",null],"b":{"c":["y","z"]}}'.encode()
    harmless = {"path": "\\u0000", "keys": {1: "int"}, "row": np.ones(2, np.float32)}
    assert to_json(harmless) == rb'{"path":"\\u0000","keys":{"1":"int"},"row":[1.0,1.0]}'
    with pytest.raises(TypeError):
        to_json({"big": 2**70})


@given(st.text(st.characters(codec=None, categories=None)))
def test_clean_text_is_valid_unicode_without_nul_and_touches_nothing_else(text: str) -> None:
    cleaned = clean_text(text)
    cleaned.encode()
    assert "\x00" not in cleaned
    assert clean_text(cleaned) == cleaned
    sound = "\x00" not in text and not any("\ud800" <= c <= "\udfff" for c in text)
    assert (cleaned == text) is sound


@pytest.mark.parametrize("score", [-0.01, 1.01, float("nan"), float("inf"), "1", True, None])
def test_a_score_outside_0_to_1_names_its_field(score: Any) -> None:
    with pytest.raises(RequestError, match="score must be a number from 0 to 1") as caught:
        Feedback.checked("r", score)
    assert caught.value.param == "score"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"id": ""}, "id"),
        ({"id": "x" * 201}, "id"),
        ({"response_id": ""}, "response_id"),
        ({"response_id": "x" * 201}, "response_id"),
        ({"labels": {"a": object()}}, "labels"),
        ({"labels": {"a": 2**70}}, "labels"),
    ],
)
def test_other_wrong_fields_are_named_too(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        Feedback.checked(**{"response_id": "r", "score": 0.5, **fields})
    assert caught.value.param == param


def test_created_is_kept_to_the_microsecond() -> None:
    precise = NOON.replace(microsecond=123456)
    assert decode(encode(make_record("a", created=precise))).created == precise
