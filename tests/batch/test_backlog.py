"""Every line is begun once, and every server sees all its work while it is loaded."""

from __future__ import annotations

import random
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from composer.batch.backlog import Backlog, Calls

calls = st.lists(st.tuples(st.sampled_from("ABC"), st.sampled_from(["", "x", "y"])), max_size=3)


def drain(backlog: Backlog) -> list[int]:
    found = []
    while (line := backlog.next()) is not None:
        found.append(line)
    return found


@given(
    plans=st.lists(calls, max_size=40),
    window=st.integers(1, 5),
    most=st.integers(1, 10),
    seed=st.integers(0, 2**32),
)
def test_every_line_is_begun_once_and_bounds_hold(
    plans: list[list[tuple[str, str]]], window: int, most: int, seed: int
) -> None:
    lines: dict[int, Calls] = dict(enumerate(plans))
    windows = dict.fromkeys("ABC", window)
    backlog = Backlog(lines, windows=windows, most=most)
    rng = random.Random(seed)
    open_: dict[int, Counter[str]] = {}
    seen: list[int] = []
    while True:
        while True:
            before = Counter(s for counts in open_.values() for s in counts.elements())
            line = backlog.next()
            if line is None:
                break
            assert line not in seen
            seen.append(line)
            open_[line] = Counter(server for server, _ in plans[line])
            assert len(open_) <= most
            # It was begun because a server that it calls had become short of calls.
            assert not plans[line] or any(before[s] < window for s, _ in plans[line])
        if not open_:
            break
        line = rng.choice(sorted(open_))
        left = sorted(open_[line].elements())
        if left and rng.random() < 0.7:
            server = rng.choice(left)
            open_[line][server] -= 1
            backlog.called(line, server)
        else:  # also with calls that never ran, as a vote that was settled leaves them
            del open_[line]
            backlog.ended(line)
    assert sorted(seen) == sorted(lines)
    assert backlog.empty


def test_lines_of_one_adapter_come_together_in_the_inputs_order() -> None:
    lines = {i: [("A", "xy"[i % 2])] for i in range(6)}
    assert drain(Backlog(lines, windows={"A": 9}, most=9)) == [0, 2, 4, 1, 3, 5]


def test_a_loaded_server_draws_every_line_that_needs_it_though_the_other_never_runs() -> None:
    """Half-done lines pile up for B; A is not left without calls, so it need not come back."""
    lines: dict[int, Calls] = {i: [("A", ""), ("B", "")] for i in range(20)}
    backlog = Backlog(lines, windows={"A": 2, "B": 2}, most=100)
    begun = drain(backlog)
    while begun != sorted(lines):
        backlog.called(begun[-1], "A")
        more = drain(backlog)
        assert len(more) <= 1
        begun += more
    assert backlog.empty


def test_servers_do_not_wait_for_each_other() -> None:
    lines: dict[int, Calls] = {i: [("AB"[i >= 10], "")] for i in range(20)}
    assert drain(Backlog(lines, windows={"A": 2, "B": 3}, most=100)) == [0, 1, 10, 11, 12]


def test_lines_that_call_nobody_are_begun_too() -> None:
    backlog = Backlog({1: [], 2: []}, windows={}, most=10)
    assert drain(backlog) == [1, 2]
    backlog.ended(1)
    backlog.called(2, "unforeseen")
    backlog.ended(2)
    assert backlog.empty
