"""An input file is refused with every wrong line named, before anything of it runs."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from composer.batch import lines as module
from composer.batch.lines import InvalidBatch, Lines
from composer.errors import RequestError
from tests.batch.helpers import ENDPOINTS, line, write


def problems(path: Path) -> list[tuple[int | None, str]]:
    with pytest.raises(InvalidBatch) as caught:
        Lines(path, ENDPOINTS)
    return [(problem.line, problem.code) for problem in caught.value.problems]


def test_good_lines_are_read_at_random_and_blank_ones_are_not_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "in", [line("a", "é"), "", line("b", "two"), "  "])
    lines = Lines(path, ENDPOINTS)
    assert len(lines) == 2
    assert lines[1].custom_id == "b"
    assert lines[0].body["messages"] == [{"role": "user", "content": "é"}]
    assert list(lines.custom_ids()) == ["a", "b"]


def test_the_last_line_needs_no_line_break(tmp_path: Path) -> None:
    path = write(tmp_path / "in", [line("a"), line("b")])
    path.write_text(path.read_text().rstrip("\n"))
    assert list(Lines(path, ENDPOINTS).custom_ids()) == ["a", "b"]


def test_everything_wrong_is_told_with_its_line(tmp_path: Path) -> None:
    path = write(
        tmp_path / "in",
        [
            line("good"),
            "{",
            "[]",
            line(""),
            line("m", method="GET"),
            line("u", url="/v1/embeddings"),
            {**line("b"), "body": "hello"},
            line("good"),
            line("x" * 513),
        ],
    )
    assert problems(path) == [
        (2, "invalid_json_line"),
        (3, "invalid_json_line"),
        (4, "missing_required_parameter"),
        (5, "invalid_method"),
        (6, "invalid_url"),
        (7, "missing_required_parameter"),
        (8, "duplicate_custom_id"),
        (9, "missing_required_parameter"),
    ]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (
            '{"custom_id": "b", "method": POST}',
            "not JSON (unexpected character, expected a JSON value, column 30); "
            "write one request, a JSON object, a line",
        ),
        ("{", "not JSON (unexpected end of data, column 2); write one request, a JSON object"),
        ("[]", "not a JSON object; write one request, a JSON object, a line"),
        (line(""), "no usable custom_id; give it a text of 1 to 512 characters"),
        (line("b", method="GET"), 'the method is not POST; write "method": "POST"'),
        (line("b", url="/v1/x"), "the url cannot be asked; write /v1/chat/completions or /v1/"),
        ({**line("b"), "body": "x"}, "the body is not a JSON object; write the request's fields"),
        (line("a"), "custom_id 'a' is also that of line 1; give it another"),
    ],
)
def test_what_is_said_of_a_wrong_line_is_one_line(
    tmp_path: Path, wrong: dict[str, Any] | str, said: str
) -> None:
    """File and line, what is wrong, the remedy; and no other line number than the file's own."""
    path = write(tmp_path / "in", [line("a"), "", wrong])
    with pytest.raises(InvalidBatch) as caught:
        Lines(path, ENDPOINTS)
    assert str(caught.value).startswith(f"{path}:3: {said}")
    assert len(str(caught.value).splitlines()) == 1


def test_all_that_is_wrong_with_a_line_is_told_at_once(tmp_path: Path) -> None:
    path = write(tmp_path / "in", [line("a"), {"custom_id": 7}, line("b", url="/")])
    with pytest.raises(InvalidBatch) as caught:
        Lines(path, ENDPOINTS)
    assert [(problem.line, problem.param) for problem in caught.value.problems] == [
        (2, "custom_id"),
        (2, "method"),
        (2, "url"),
        (2, "body"),
        (3, "url"),
    ]


def test_a_duplicate_names_both_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "in", [line("a"), line("b"), "", line("a"), line("a")])
    with pytest.raises(InvalidBatch) as caught:
        Lines(path, ENDPOINTS)
    assert str(caught.value).splitlines() == [
        f"{path}:4: custom_id 'a' is also that of line 1; give it another",
        f"{path}:5: custom_id 'a' is also that of line 1; give it another",
    ]


def test_equal_hashes_of_different_ids_are_no_duplicate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_hash", lambda custom_id: 7)
    path = write(tmp_path / "in", [line("a"), line("b"), line("c")])
    assert len(Lines(path, ENDPOINTS)) == 3
    write(path, [line("a"), line("b"), line("a")])
    assert problems(path) == [(3, "duplicate_custom_id")]


def test_a_line_that_is_too_long_is_not_held_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_LINE", 200)
    path = write(tmp_path / "in", [line("a"), line("b", "x" * 1000), line("c", url="/")])
    assert problems(path) == [(2, "line_too_long"), (3, "invalid_url")]


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_a_file_without_requests(tmp_path: Path, text: str) -> None:
    (tmp_path / "in").write_text(text)
    assert problems(tmp_path / "in") == [(None, "empty_file")]
    with pytest.raises(InvalidBatch, match=r"/in: there are no requests in it; write one a line"):
        Lines(tmp_path / "in", ENDPOINTS)


def test_many_problems_are_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "in", ["{"] * 30)
    with pytest.raises(InvalidBatch, match="and 10 more"):
        Lines(path, ENDPOINTS)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="No such file"):
        Lines(tmp_path / "none", ENDPOINTS)


def test_a_file_changed_while_it_is_read_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path / "in", [line("a"), line("b")])
    lines = Lines(path, ENDPOINTS)
    write(path, [line("a", "another text"), line("b")])
    with pytest.raises(RequestError, match="was changed"):
        lines[0]


def test_a_file_replaced_while_it_is_read_does_not_matter(tmp_path: Path) -> None:
    path = write(tmp_path / "in", [line("a"), line("b")])
    lines = Lines(path, ENDPOINTS)
    os.replace(write(tmp_path / "other", [line("c")]), path)
    assert list(lines.custom_ids()) == ["a", "b"]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=300))
def test_any_bytes_are_read_or_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "in").write_bytes(data)
    with suppress(InvalidBatch):
        lines = Lines(tmp_path / "in", ENDPOINTS)
        assert len(list(lines.custom_ids())) == len(lines) > 0
