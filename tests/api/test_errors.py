"""The one error table: complete, and silent about the inside."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from api.errors import TABLE, WireError, logged, wire_error, without_paths
from composer import errors
from composer.errors import ComposerError, Problem

SECRET = "postgresql://user:password@db/srv"


def tree(root: type[ComposerError] = ComposerError) -> Iterator[type[ComposerError]]:
    yield root
    for child in root.__subclasses__():
        yield from tree(child)


def test_the_table_has_every_error_of_the_tree_and_nothing_else() -> None:
    defined = {kind for kind in tree() if kind.__module__ == errors.__name__}
    assert set(TABLE) == defined


def example(kind: type[ComposerError]) -> ComposerError:
    if issubclass(kind, errors.CatalogError):
        return kind([Problem(SECRET, "experts.x", "it is wrong", "Mend it.", 3)])
    if issubclass(kind, errors.Overloaded):
        return kind("full", retry_after=2.2)
    return kind("the words")


@pytest.mark.parametrize("kind", list(TABLE), ids=lambda kind: kind.__name__)
def test_each_error_has_openais_shape(kind: type[ComposerError]) -> None:
    wire = wire_error(example(kind))
    assert set(wire.body) == {"error"}
    assert {"message", "type", "param", "code"} <= set(wire.body["error"])
    assert wire.code == kind.code
    assert 400 <= wire.status < 600


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (errors.RequestError("x"), 400),
        (errors.UnknownModel("x"), 404),
        (errors.Unsupported("x"), 400),
        (errors.ContextTooLong("x"), 400),
        (errors.Conflict("x"), 409),
        (example(errors.AdapterError), 400),
        (errors.EngineError("x"), 502),
        (errors.EngineUnavailable("x"), 503),
        (errors.EngineMisconfigured("x"), 502),
        (errors.EngineRefused("x"), 403),
        (errors.EngineFull("x", over=1), 409),
        (errors.Overloaded("x", retry_after=1), 503),
        (errors.StoreError("x"), 503),
        (errors.UnknownResponse("x"), 404),
        (errors.SettingsError("x"), 500),
        (ZeroDivisionError("x"), 500),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else str(value),
)
def test_statuses(error: Exception, status: int) -> None:
    assert wire_error(error).status == status


def test_a_subclass_of_a_room_counts_as_the_nearest_error_of_the_tree() -> None:
    class DatabaseGone(errors.StoreError):
        pass

    assert wire_error(DatabaseGone("x")).status == 503


def test_param_and_the_callers_words_are_kept() -> None:
    wire = wire_error(errors.Unsupported("no images", param="messages"))
    assert (wire.message, wire.param, wire.code) == ("no images", "messages", "unsupported")


def test_retry_after_is_rounded_up_to_whole_seconds() -> None:
    assert wire_error(errors.Overloaded("x", retry_after=2.2)).headers == {"retry-after": "3"}
    assert wire_error(errors.Overloaded("x", retry_after=0.0)).headers == {"retry-after": "1"}
    never = errors.Overloaded("x", retry_after=float("inf"))
    assert wire_error(never).headers == {"retry-after": "3600"}
    assert int(wire_error(errors.EngineUnavailable("x")).headers["retry-after"]) > 0
    assert wire_error(errors.EngineError("x")).headers == {}
    assert wire_error(errors.EngineMisconfigured("x")).headers == {}


def test_problems_are_listed_without_the_operators_file(caplog: pytest.LogCaptureFixture) -> None:
    wire = logged(example(errors.CatalogError), "abc")
    assert SECRET in caplog.text
    assert wire.body["error"]["problems"] == [
        {"path": "experts.x", "message": "it is wrong", "remedy": "Mend it."}
    ]
    assert wire.message == "experts.x: it is wrong. Mend it."


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("/srv/a/../b: it leads to /etc/x, not in (/srv)", "…: it leads to …, not in (…)"),
        ("`/srv/a b`", "`… b`"),
        ("'/srv/x.safetensors' is cut short", "'…' is cut short"),
        ("./adapters/x and adapters/y stay", "./adapters/x and adapters/y stay"),
        ("team/sort, 8/16 and a / b stay", "team/sort, 8/16 and a / b stay"),
        ("https://example.org/x stays", "https://example.org/x stays"),
    ],
)
def test_absolute_paths_are_not_told(text: str, told: str) -> None:
    assert without_paths(text) == told


@pytest.mark.parametrize(
    "error",
    [
        errors.StoreError(SECRET),
        errors.EngineError(SECRET),
        errors.EngineUnavailable(SECRET),
        errors.SettingsError(SECRET),
        ComposerError(SECRET),
        RuntimeError(SECRET),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_is_the_operators_goes_to_the_log_alone(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR):
        wire: WireError = logged(error, "abc")
    assert SECRET not in str(wire.body)
    (record,) = caplog.records
    assert record.levelname == "ERROR"
    assert record.message == f"request abc: {error}"
    assert SECRET in record.message
    assert (record.exc_info is not None) == (not isinstance(error, ComposerError))


def test_the_callers_own_errors_are_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        logged(errors.UnknownModel("x"), "abc")
        logged(errors.Overloaded("x", retry_after=1), "abc")
    assert caplog.text == ""
