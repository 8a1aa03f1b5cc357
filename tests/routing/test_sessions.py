"""Which requests are of one session, and for how long it is remembered."""

from __future__ import annotations

from typing import Any

import pytest

from composer.routing.sessions import Sessions
from composer.types import Component, Message, Policy, Request

STAYS = Policy("p", Component("r", None), Component("s", None), ("a", "b"), stay=0.1)


def turns(*texts: str, system: str | None = None) -> tuple[Message, ...]:
    """The user's texts with answers between them."""
    messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    for text in texts[:-1]:
        messages += [{"role": "user", "content": text}, {"role": "assistant", "content": "ok"}]
    return (*messages, {"role": "user", "content": texts[-1]})


def asked(*texts: str, system: str | None = None, **fields: Any) -> Request:
    return Request(id="r", model="p", messages=turns(*texts, system=system), **fields)


class Clock:
    def __init__(self) -> None:
        self.at = 0.0

    def __call__(self) -> float:
        return self.at


def after(first: Request, then: Request, policy: Policy = STAYS) -> tuple[str, ...]:
    """Who answered last in the second request's session, where "a" answered the first."""
    sessions = Sessions()
    session = sessions.of(first, STAYS)
    assert session is not None
    sessions.keep(session, ["a"])
    found = sessions.of(then, policy)
    assert found is not None
    return sessions.experts(found)


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (asked("hi"), asked("hi", "and?")),
        (asked("hi", system="be brief"), asked("hi", "and?", "so?", system="be brief")),
        (asked("hi", session="s"), asked("something else", session="s")),
        (asked("hi", caller="ann"), asked("hi", "and?", caller="ann")),
        (asked("hi", session="s"), Request("r", "p", prompt="once upon", session="s")),
    ],
)
def test_one_session(first: Request, then: Request) -> None:
    assert after(first, then) == ("a",)


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (asked("hi"), asked("ho", "and?")),
        (asked("hi", system="be brief"), asked("hi", "and?")),
        (asked("hi", session="s"), asked("hi", "and?", session="t")),
        (asked("hi", session="s"), asked("hi", "and?")),
        (asked("hi", caller="ann"), asked("hi", "and?", caller="bob")),
        (asked("hi", session="s", caller="ann"), asked("hi", session="s", caller="bob")),
        (asked("hi", session="ab", caller=""), asked("hi", session="b", caller="a")),
    ],
)
def test_different_sessions(first: Request, then: Request) -> None:
    assert after(first, then) == ()


def test_a_conversation_that_begins_again_has_no_expert_yet() -> None:
    assert after(asked("hi"), asked("hi")) == ()


def test_another_policys_session_is_another() -> None:
    other = Policy("q", Component("r", None), Component("s", None), ("a",), stay=0.1)
    assert after(asked("hi"), asked("hi", "and?"), other) == ()


def test_images_tell_conversations_apart() -> None:
    def shown(url: str, *more: Message) -> Request:
        image = {"type": "image_url", "image_url": {"url": url}}
        return Request("r", "p", messages=({"role": "user", "content": [image]}, *more))

    more: Message = {"role": "user", "content": "and?"}
    assert after(shown("data:1"), shown("data:1", more)) == ("a",)
    assert after(shown("data:1"), shown("data:2", more)) == ()


@pytest.mark.parametrize(
    ("request_", "policy"),
    [
        (asked("hi", "and?"), Policy("p", Component("r", None), Component("s", None), ("a",))),
        (asked("hi", "and?", priority="batch", session="s"), STAYS),
        (Request("r", "p", prompt="once upon"), STAYS),
        (Request("r", "p", messages=({"role": "system", "content": "x"},)), STAYS),
    ],
)
def test_requests_that_are_of_no_session(request_: Request, policy: Policy) -> None:
    assert Sessions().of(request_, policy) is None


def test_a_session_is_forgotten_an_expiry_after_its_last_answer() -> None:
    clock = Clock()
    sessions = Sessions(expiry_s=10, now=clock)
    session = sessions.of(asked("hi", session="s"), STAYS)
    assert session is not None
    sessions.keep(session, ["a"])
    clock.at = 9
    sessions.keep(session, ["b"])
    clock.at = 19
    assert sessions.experts(session) == ("b",)
    clock.at = 19.5
    assert sessions.experts(session) == ()
    other = sessions.of(asked("hi", session="t"), STAYS)
    assert other is not None
    sessions.keep(other, ["a"])
    assert len(sessions) == 1  # what expired is gone, not only hidden


def test_the_latest_answered_sessions_are_kept() -> None:
    sessions = Sessions(most=3)
    found = [sessions.of(asked("hi", session=str(i)), STAYS) for i in range(4)]
    for i in (0, 1, 2, 0, 3):
        session = found[i]
        assert session is not None
        sessions.keep(session, [f"e{i}"])
    assert len(sessions) == 3
    assert [sessions.experts(s) for s in found if s] == [("e0",), (), ("e2",), ("e3",)]


def test_no_text_is_kept_nor_what_it_could_be_found_again_by() -> None:
    """Equal sessions have other keys in another process, so that no list of likely texts fits."""
    request = asked("my secret", "and?", session="my key")
    one, two = Sessions().of(request, STAYS), Sessions().of(request, STAYS)
    assert one is not None
    assert two is not None
    assert one.key != two.key
    assert len(one.key) == 16
