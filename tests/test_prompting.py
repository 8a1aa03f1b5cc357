"""The `prompt:` block: reading free wording, and errors that name the remedy."""

from __future__ import annotations

import re
import string
import time
from typing import Any

import pytest
import regex
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from composer import prompting
from composer.errors import Unsupported
from composer.prompting import MAX_CHARS, MAX_EARLIER, PromptSpec, extract, render

QUOTED = {"regex": r"([\"'])(?P<word>[a-z]+)\1"}
LEFTOVER = {"leftover": "[a-z]{2,}", "field": "word"}


def block(*steps: dict[str, Any], **settings: Any) -> PromptSpec:
    settings = {"template": "do {word}", "lower": True} | settings
    return PromptSpec.model_validate({"extract": steps, **settings})


# --- regex steps ---------------------------------------------------------------------------


def test_the_first_step_that_matches_fills_the_field() -> None:
    spec = block(QUOTED, {"regex": r": (?P<word>[a-z]+)"})
    assert render(spec, "write 'fox' like this: hen") == "do fox"
    assert render(spec, "write like this: hen") == "do hen"


@pytest.mark.parametrize("quotes", ["“%s”", "‘%s’", "«%s»", "„%s“", '"%s"', "'%s'"])
def test_curly_quotes_are_straight_ones(quotes: str) -> None:
    assert render(block(QUOTED), "write " + quotes % "fox") == "do fox"


def test_steps_complete_each_other_and_earlier_ones_win() -> None:
    spec = block(
        {"regex": r"letter (?P<letter>[a-z])\b"},
        {"regex": r"(?P<letter>[a-z]) in (?P<word>[a-z]+)"},
        template="count {letter} {word}",
    )
    assert render(spec, "count the letter r, not the x in strawberry") == "count r strawberry"
    assert render(spec, "how many r in strawberry") == "count r strawberry"
    assert extract(spec, "count the letter r") is None


def test_a_group_that_took_no_part_fills_nothing() -> None:
    spec = block({"regex": r"x(?P<word>[a-z]+)?"}, LEFTOVER)
    assert render(spec, "x and fox") == "do fox"


def test_skipped_words_are_passed_over_to_overlapping_matches() -> None:
    step = {"regex": r"(?P<word>[a-z]+) (?:word|fox|loud)", "skip": "request"}
    assert render(block(step), "make word fox loud") == "do fox"
    assert render(block(step | {"skip": "none"}), "make word fox loud") == "do make"


def test_a_skipped_word_behind_the_match_is_passed_over_once() -> None:
    step = {"regex": r"(?<=(?P<word>the|red) )fox", "skip": "function"}
    assert render(block(step), "the fox") == "the fox"
    assert render(block(step), "the fox, red fox") == "do red"


# --- leftover steps ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "Could you please write fox",
        "fox, please!",
        "What would FOX be?",
        "I'd like the word fox, if you don't mind. Thanks",
        "show me fox's letters",
    ],
)
def test_leftover_is_what_a_request_would_not_hold(text: str) -> None:
    assert render(block(LEFTOVER), text) == "do fox"


@pytest.mark.parametrize(
    ("take", "word"), [("first", "hen"), ("last", "pig"), ("longest", "goose")]
)
def test_which_leftover_is_taken(take: str, word: str) -> None:
    step = LEFTOVER | {"take": take}
    assert render(block(step), "the horse, hen, goose and pig"[10:]) == f"do {word}"


def test_the_last_of_the_longest_is_taken() -> None:
    assert render(block(LEFTOVER | {"take": "longest"}), "hen horse goose") == "do goose"


def test_ignored_and_context_words_are_put_aside_in_any_case() -> None:
    spec = block(LEFTOVER, ignore=["Capitals"], context=["poster"], lower=False)
    assert render(spec, "fox in capitals for the poster") == "do fox"
    assert render(block(LEFTOVER, ignore=["capitals"]), "FOX in CAPITALS") == "do fox"


def test_a_later_step_may_skip_less() -> None:
    careful = block(
        LEFTOVER, LEFTOVER | {"skip": "function"}, ignore=["capitals"], context=["poster"]
    )
    assert render(careful, "the poster in capitals please") == "do poster"
    assert render(careful, "the fox in capitals on the poster") == "do fox"
    bare = block(LEFTOVER | {"skip": "none"})
    assert render(bare, "the fox please") == "do please"


def test_a_token_must_match_wholly() -> None:
    spec = block({"leftover": "[0-9]{3}", "field": "word"})
    assert render(spec, "1234 567 89") == "do 567"
    assert render(block(LEFTOVER), "a well-known fox") == "do fox"


# --- case, absence, length -----------------------------------------------------------------


def test_case_is_kept_unless_lower() -> None:
    steps = ({"regex": "(?i)word (?P<word>[a-z]+)"},)
    assert render(block(*steps, lower=False), "Word FOX") == "do FOX"
    assert render(block(*steps), "Word FOX") == "do fox"


def test_nothing_found_passes_the_message_unchanged() -> None:
    assert render(block(QUOTED), "“No  word” HERE") == "“No  word” HERE"


def test_nothing_found_refuses_with_the_remedy() -> None:
    spec = block(QUOTED, otherwise="refuse")
    with pytest.raises(
        Unsupported, match="found no word in the message: put the input in quotes"
    ) as e:
        render(spec, "no word here")
    assert e.value.param == "messages"


def test_long_messages_are_not_searched() -> None:
    text = "x" * (MAX_CHARS - 5) + "'fox'"
    assert render(block(QUOTED), text) == "do fox"
    assert render(block(QUOTED), "x" + text) == "x" + text


def test_braces_in_template_and_message_are_only_text() -> None:
    spec = block({"regex": "'(?P<word>[^']+)'"}, template="{{do}} {word} {word}")
    assert render(spec, "say '{evil} {0}'") == "{do} {evil} {0} {evil} {0}"
    assert spec.fields == ("word",)


# --- time ----------------------------------------------------------------------------------

SLOW = r"(?P<word>\w+)" + r".*\bto\b.*(?:\w+)" * 8 + r"\d"
"""Honest, and never done with SLOW_TEXT: backtracking takes time of its 17th power."""
SLOW_TEXT = "a to " * 100


@pytest.mark.parametrize(
    "step",
    [
        {"regex": SLOW},
        {"regex": r"(?P<word>(?:(?:\w+|to) ?)+)+\d"},
        {"leftover": r"(?:a|b|ab)+\d", "field": "word"},
    ],
)
def test_a_slow_pattern_counts_as_nothing_found(
    step: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    spec = block(step, {"regex": "(?P<word>fox)"})
    text = SLOW_TEXT + "ab" * 100
    assert render(spec, text) == text
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert repr(step.get("regex", step.get("leftover"))) in record.message
    with pytest.raises(Unsupported):
        render(block(step, otherwise="refuse"), text)


def test_the_time_is_that_of_all_steps_together(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))
    monkeypatch.setattr(prompting, "thread_time", lambda: 0.02 * next(clock))
    fields = string.ascii_lowercase[:4]
    steps = [{"regex": f"(?P<{field}>{field})"} for field in fields]  # each takes 20 ms
    assert extract(block(*steps[:3], template="{a} {b} {c}"), "abcd") is not None
    assert extract(block(*steps, template="{a} {b} {c} {d}"), "abcd") is None


def test_what_other_threads_compute_does_not_end_a_search() -> None:
    """The library's clock counts it, so it may say that the time is up when it is not."""
    budget = prompting._Budget(0.05)
    ends = iter([True, True, False])

    def search(text: str, start: int, timeout: float) -> None:
        assert 0 < timeout <= 0.05
        if next(ends):
            raise TimeoutError

    assert budget.run(search, "a fox") is None
    assert next(ends, None) is None
    with pytest.raises(TimeoutError):  # but it ends one that lasts
        prompting._Budget(0.05).run(block({"regex": SLOW}).extract[0].pattern.search, SLOW_TEXT)


def test_another_message_has_its_own_time() -> None:
    spec = block({"regex": SLOW}, LEFTOVER)
    assert render(spec, SLOW_TEXT) == SLOW_TEXT
    assert render(spec, "a fox") == "do fox"


def test_blocks_that_share_patterns_compile_them_once(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    real = regex.compile

    def compile_(pattern: str, flags: int) -> Any:
        compiled.append(pattern)
        return real(pattern, flags)

    monkeypatch.setattr(regex, "compile", compile_)
    for i in range(50):
        render(block({"regex": "(?P<word>shared [a-z]+)"}, ignore=[str(i)]), "some shared fox")
    assert compiled == ["(?P<word>shared [a-z]+)"]


# --- errors --------------------------------------------------------------------------------

WRONG: list[tuple[dict[str, Any], str]] = [
    (
        {"template": "do it"},
        "the template 'do it' has no field: write what is found as a named field",
    ),
    ({"template": "do {}"}, "has a field that is not a plain name: write it as {name}"),
    ({"template": "do {word.x}"}, "has a field that is not a plain name: write it as {name}"),
    ({"template": "do {word!r}"}, "has a field that is not a plain name: write it as {name}"),
    ({"template": "do {word:>9}"}, "has a field that is not a plain name: write it as {name}"),
    ({"template": "do {word"}, "is malformed (expected '}' before end of string): write a field"),
    ({"template": "do {word} {n}"}, "no extract step fills `n`: add a step with that field"),
    ({"extract": [LEFTOVER, {"regex": "(?P<n>[0-9])"}]}, "the template has no field `n`"),
    ({"extract": [{"regex": "(?P<word>[a-z]"}]}, "does not compile (missing ) at position 14"),
    ({"extract": [{"leftover": "[a-z", "field": "word"}]}, "does not compile (unterminated"),
    ({"extract": [{"regex": "[a-z]+"}]}, "has no named group: name what it finds"),
    ({"extract": [{"regex": "(?V1)(?P<word>x)"}]}, "does not compile (VERSION0 and VERSION1"),
    ({"extract": [{"regex": "(" * 5000}]}, "does not compile (maximum recursion depth"),
    ({"extract": [{"pattern": "x"}]}, "an extract step has the key `regex` or `leftover`"),
    ({"extract": [{"regex": "(?P<word>x)", "take": "last"}]}, "Extra inputs are not permitted"),
    ({"extract": [{"leftover": "x"}]}, "Field required"),
    ({"extract": []}, "should have at least 1 item"),
    ({"otherwise": "drop"}, "Input should be 'pass' or 'refuse'"),
    ({"extarct": []}, "Extra inputs are not permitted"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_a_wrong_block_is_refused_with_the_remedy(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(message)):
        PromptSpec.model_validate({"template": "do {word}", "extract": [LEFTOVER]} | change)


def test_an_error_names_the_place() -> None:
    with pytest.raises(ValidationError) as caught:
        PromptSpec.model_validate(
            {
                "template": "do {word}",
                "extract": [LEFTOVER, {"regex": "(?P<word>x)", "skip": "all"}],
            }
        )
    assert caught.value.errors()[0]["loc"] == ("extract", 1, "regex", "skip")


def test_blocks_are_frozen_hashable_and_survive_json() -> None:
    spec = block(QUOTED, LEFTOVER, ignore=["x"])
    with pytest.raises(ValidationError):
        spec.lower = False  # type: ignore[misc]
    assert hash(spec) == hash(PromptSpec.model_validate_json(spec.model_dump_json()))
    assert PromptSpec.model_validate(spec) == spec
    assert set(PromptSpec.model_json_schema()["properties"]) >= {"template", "extract"}


# --- properties ----------------------------------------------------------------------------

words = st.text(string.ascii_lowercase, min_size=2, max_size=12)


@given(st.text(max_size=MAX_CHARS + 50))
def test_any_text_is_filled_in_or_passed_unchanged(text: str) -> None:
    prompt = render(block(QUOTED, LEFTOVER), text)
    assert prompt == text or re.fullmatch(r"do [a-z]+", prompt)


@given(st.text(max_size=300))
def test_any_text_is_filled_in_or_refused(text: str) -> None:
    spec = block(QUOTED, LEFTOVER, otherwise="refuse")
    try:
        assert render(spec, text) == f"do {(extract(spec, text) or {})['word']}"
    except Unsupported:
        assert extract(spec, text) is None


@given(words, st.text(string.ascii_letters + " ,.!?", max_size=200))
def test_a_quoted_word_is_found_whatever_surrounds_it(word: str, around: str) -> None:
    for text in (f"{around} '{word}'", f"'{word}' {around}", f"{around} “{word}” {around}"):
        assert render(block(QUOTED, LEFTOVER), text) == f"do {word}"


@given(words.filter(lambda w: not w.endswith("s")))
def test_a_word_alone_is_found_in_any_case(word: str) -> None:
    spec = block(LEFTOVER, LEFTOVER | {"skip": "none"})
    for text in (word, word.upper(), f"{word}.", f"  {word}'s", f"({word})"):
        assert render(spec, text) == f"do {word}"


def test_reading_a_long_message_is_quick() -> None:
    spec = block(QUOTED, {"regex": r"(?P<word>[a-z]+)\s*:\s*$"}, LEFTOVER)
    text = "word " * (MAX_CHARS // 5)
    started = time.perf_counter()
    for _ in range(20):
        render(spec, text)
    assert (time.perf_counter() - started) / 20 < 0.05


# --- earlier messages ----------------------------------------------------------------------


def test_a_message_without_input_takes_that_of_the_latest_one_that_has_it() -> None:
    spec = block(QUOTED)
    assert render(spec, "and now?", ["'fox' please", "'hen' too", "good"]) == "do hen"
    assert render(spec, "'owl'", ["'fox'"]) == "do owl"
    assert render(spec, "and now?", ["fox"]) == "and now?"


def test_half_an_input_is_not_completed_from_another_message() -> None:
    spec = block(
        {"regex": "letter (?P<letter>[a-z])"},
        {"regex": "in (?P<word>[a-z]+)"},
        template="count {letter} {word}",
    )
    assert render(spec, "in fox", ["letter o in hen"]) == "count o hen"


def test_only_a_few_messages_back_are_searched() -> None:
    earlier = ["'fox'", *["no"] * MAX_EARLIER]
    assert render(block(QUOTED), "again", earlier) == "again"
    assert render(block(QUOTED), "again", earlier[:-1]) == "do fox"
