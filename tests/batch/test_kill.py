"""A batch killed by kill -9, five times at random moments: no line twice, none lost, none asked
again whose answer was on disk."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest

from composer.batch.answers import _payload
from tests.batch.helpers import content, line, read, write
from tests.tiny import ASKED, ROOT

LINES = 2000
KILLS = 5


def on_disk(partial: Path) -> set[int]:
    """The lines that a file of answers holds whole; read as the next run will."""
    found: set[int] = set()
    with partial.open("rb") as file:
        for number, raw in enumerate(file):
            payload = _payload(raw)
            if payload is None:
                break
            if number:
                found.add(int(payload.split(b" ", 1)[0]))
    return found


def grown(partial: Path, lines: int) -> bool:
    if not partial.exists():
        return False
    with partial.open("rb") as file:
        return sum(1 for _ in file) - 1 >= lines


def run_and_kill(
    command: Sequence[str], partial: Path, at: int, rng: random.Random, timeout_s: float
) -> None:
    """Kills it a few milliseconds after its answers are `at`."""
    child = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    until = time.monotonic() + timeout_s
    try:
        while not grown(partial, at):
            assert child.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < until, "it does not get on"
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.05))
    finally:
        child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL


def moments(rng: random.Random, lines: int) -> list[int]:
    """Counts of answers at which the kills come, an early one among them."""
    return sorted([rng.randrange(20), *rng.sample(range(20, lines * 4 // 5), KILLS - 1)])


@pytest.mark.parametrize("seed", [1])
def test_five_kills_lose_nothing_and_repeat_nothing(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    names = [rng.choice(["shout", "team/sort"]) for _ in range(LINES)]
    source = write(
        tmp_path / "in.jsonl",
        [line(f"id-{i}", f"question {i} for {name}") for i, name in enumerate(names)],
    )
    target, trace = tmp_path / "out.jsonl", tmp_path / "trace"
    partial = tmp_path / "out.jsonl.partial"
    command = [sys.executable, "-m", "tests.batch.child", str(source), str(target), str(trace)]

    safe: list[set[int]] = []  # what was on disk when each kill had come
    asked: list[list[int]] = []  # what each run asked
    traced = 0

    def note() -> None:
        nonlocal traced
        questions = trace.read_text().splitlines()
        asked.append([int(text.split()[1]) for text in questions[traced:]])
        traced = len(questions)

    for at in moments(rng, LINES):
        further = 1 + len(safe[-1]) if safe else 0  # so that every run gets on
        run_and_kill(command, partial, max(at, further), rng, timeout_s=60)
        safe.append(on_disk(partial))
        note()
        assert not target.exists()
    subprocess.run(command, cwd=ROOT, check=True, timeout=60)
    note()

    answered = read(target)
    assert [one["custom_id"] for one in answered] == [f"id-{i}" for i in range(LINES)]
    for i, (one, name) in enumerate(zip(answered, names, strict=True)):
        assert content(one) == f"{name}: question {i} for {name}"
    assert not partial.exists()

    assert all(earlier < later for earlier, later in pairwise(safe))
    for before, run in zip(safe, asked[1:], strict=True):
        assert before.isdisjoint(run), "asked again though the answer was on disk"
    assert all(count == 1 for run in asked for count in Counter(run).values())
    # Asked twice can only be what was under way at a kill: at most the calls that ran then.
    assert sum(map(len, asked)) - LINES <= KILLS * (16 + 64)


@pytest.mark.slow
def test_five_kills_over_the_real_tiny_experts(tmp_path: Path) -> None:
    rng = random.Random(5)
    skills = [rng.choice(sorted(ASKED)) for _ in range(LINES)]
    source = write(
        tmp_path / "in.jsonl",
        [
            line(f"id-{i}", ASKED[skill][0], body={"max_tokens": 8, "temperature": 0})
            for i, skill in enumerate(skills)
        ],
    )
    target, partial = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    os.environ["COMPOSER_DATABASE_URL"] = f"sqlite+aiosqlite:///{tmp_path}/composer.db"
    os.environ["COMPOSER_JOURNAL"] = str(tmp_path / "journal")
    command = [sys.executable, "-m", "composer.cli", "batch", str(source), str(target)]
    seen: set[int] = set()
    for at in moments(rng, LINES):
        run_and_kill(command, partial, at, rng, timeout_s=300)
        assert seen <= on_disk(partial)
        seen = on_disk(partial)
    subprocess.run(command, cwd=ROOT, check=True, timeout=600)
    answered = read(target)
    assert [one["custom_id"] for one in answered] == [f"id-{i}" for i in range(LINES)]
    right = [content(one).strip() == ASKED[s][1] for one, s in zip(answered, skills, strict=True)]
    assert sum(right) >= 0.99 * LINES
