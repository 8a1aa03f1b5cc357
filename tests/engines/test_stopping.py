"""Text from tokens: no broken characters, no stop string, whatever the cut."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from composer.engines.stopping import Answer, Detokenizer, StopScanner
from composer.types import TokenLogprob
from tests.engines.conftest import MULTIBYTE, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
END = TOKENIZER.eos_token_id
TEXT = st.text(alphabet="ab \n" + MULTIBYTE, max_size=30)


def decode(ids: list[int]) -> str:
    return TOKENIZER.decode(ids, skip_special_tokens=True)


def encode(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False).input_ids


@given(prompt=TEXT, text=TEXT)
def test_pieces_join_to_the_text_and_hold_whole_characters(prompt: str, text: str) -> None:
    detokenizer = Detokenizer(decode, encode(prompt))
    pieces = [detokenizer.push(token) for token in encode(text)]
    assert "".join(pieces) == text
    assert detokenizer.flush() == ""


def test_a_character_appears_with_its_last_byte() -> None:
    detokenizer = Detokenizer(decode, [])
    assert [detokenizer.push(token) for token in encode("😀")] == ["", "", "", "😀"]


def test_an_unfinished_character_is_shown_at_the_end() -> None:
    detokenizer = Detokenizer(decode, encode("x"))
    for token in encode("a€")[:-1]:
        detokenizer.push(token)
    assert detokenizer.flush() == "\ufffd"


def test_broken_bytes_do_not_hold_text_back_for_ever() -> None:
    detokenizer = Detokenizer(decode, [])
    lead = encode("😀")[0]
    assert any(detokenizer.push(lead) for _ in range(20))


def test_a_first_token_keeps_its_leading_space() -> None:
    """As SentencePiece decodes: the very first space is dropped, one after other text is not."""
    words = ["▁one", "▁two"]

    def decode_pieces(ids: list[int]) -> str:
        return "".join(words[i] for i in ids).replace("▁", " ").removeprefix(" ")

    assert Detokenizer(decode_pieces, [0]).push(1) == " two"
    assert Detokenizer(decode_pieces, []).push(1) == "two"


@given(
    text=st.text(alphabet="abc", max_size=20),
    stops=st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 20), max_size=6),
)
def test_stop_scanner_does_not_depend_on_the_cut(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    ends = [text.find(s) + len(s) for s in stops if s in text]
    if ends:
        first = min(ends)
        start = first - max(len(s) for s in stops if text[:first].endswith(s))
        expected = text[:start]
    else:
        expected = text
    scanner = StopScanner(stops)
    given_out, found = "", False
    edges = sorted({0, len(text), *(min(c, len(text)) for c in cuts)})
    for begin, end in itertools.pairwise(edges):
        piece, found = scanner.push(text[begin:end])
        given_out += piece
        if found:
            break
    else:
        given_out += scanner.flush()
    assert found == bool(ends)
    assert given_out == expected


def test_only_the_beginning_of_a_stop_is_held_back() -> None:
    scanner = StopScanner(["</answer>"])
    assert scanner.push("yes </ans") == ("yes ", False)
    assert scanner.push("x") == ("</ansx", False)


def answer(text: str, *, stops: tuple[str, ...] = (), budget: int = 100) -> list[object]:
    grown = Answer(0, decode=decode, prompt=[], stops=stops, ends={END}, budget=budget)
    chunks = []
    for token in [*encode(text), END]:
        chunk = grown.push(token, TokenLogprob(decode([token]), -1.0))
        chunks += [chunk] if chunk else []
        if grown.ended:
            break
    assert grown.ended
    return chunks


@pytest.mark.parametrize(
    ("stops", "budget", "text", "reason", "logprobs"),
    [
        ((), 100, "ab€ cd", "stop", 8),
        ((), 3, "ab\ufffd", "length", 3),
        (("€ c",), 100, "ab", "stop", 2),
        (("d!",), 100, "ab€ cd", "stop", 8),
        (("cde",), 8, "ab€ cd", "length", 8),
    ],
)
def test_answer_ends_once_with_its_reason_and_the_logprobs_of_its_text(
    stops: tuple[str, ...], budget: int, text: str, reason: str, logprobs: int
) -> None:
    chunks = answer("ab€ cd", stops=stops, budget=budget)
    assert "".join(c.text for c in chunks) == text
    assert [c.finish_reason for c in chunks if c.finish_reason] == [reason]
    assert sum(len(c.logprobs) for c in chunks) == logprobs
