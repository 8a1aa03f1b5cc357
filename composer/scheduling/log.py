"""The scheduler's event log: every event and action of every device, kept, written, read, replayed.

Knows no policy and no server; nothing that a call says is in it. A step is one event and what
the device's policy answered. The file is JSON lines: a header, then a step a line, as

    {"seq": 7, "owner": 1, "device": "gpu0", "at": 12.5,
     "event": {"kind": "finished", "call": 3}, "actions": [{"kind": "grant", "call": 4}]}
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, get_args

import orjson
from pydantic import TypeAdapter

from composer.scheduling.events import Action, DevicePolicy, Event
from composer.scheduling.logfile import LogFile, read_lines
from composer.types import empty

__all__ = ["EventLog", "Mismatch", "Step", "decode", "encode", "plain", "read_lines", "replay"]

FORMAT = "composer scheduler log"
VERSION = 1

KEPT = 10_000
"""Steps held in memory, for a look at what has just happened."""


@dataclass(frozen=True, slots=True)
class Step:
    """One event of a device, at `at` seconds, and the policy's actions. `owner` numbers the
    device's owners: a device that left and came back has a new one, with a new policy. `expert`
    is whom an arrived call asks; `fault` what the policy raised instead of answering."""

    seq: int
    owner: int
    device: str
    at: float
    event: Event
    actions: tuple[Action, ...]
    expert: str | None = None
    fault: str | None = None


class EventLog:
    """The newest steps in memory; with `path` all of them in a file, too.

    `add` never blocks and never raises: a thread encodes and writes, and where the disk does not
    follow, steps are left out; their numbers are then missing. Raises SettingsError for a file that
    cannot be opened.
    """

    def __init__(
        self, path: Path | None = None, header: Mapping[str, Any] = empty(), *, kept: int = KEPT
    ) -> None:
        """`header` goes into the file's first line; the policy's settings belong there."""
        self._last: deque[Step] = deque(maxlen=kept)
        first = {"log": FORMAT, "version": VERSION, **header}
        self._file = None if path is None else LogFile(path, first, encode)
        self.steps = 0

    def add(
        self,
        owner: int,
        device: str,
        at: float,
        event: Event,
        actions: Iterable[Action],
        *,
        expert: str | None = None,
        fault: str | None = None,
    ) -> None:
        self.steps += 1
        step = Step(self.steps, owner, device, at, event, tuple(actions), expert, fault)
        self._last.append(step)
        if self._file is not None:
            self._file.put(step)

    def last(self, count: int = KEPT) -> list[Step]:
        """Oldest first."""
        return list(islice(self._last, max(len(self._last) - count, 0), None))

    def stats(self) -> Mapping[str, Any]:
        return {"steps": self.steps, **({} if self._file is None else self._file.stats())}

    def close(self) -> None:
        """Blocks until everything is written. Safe to call twice."""
        if self._file is not None:
            self._file.close()


# --- reading back --------------------------------------------------------------------


def plain(step: Step) -> dict[str, Any]:
    """The step as it stands in a line."""
    said: dict[str, Any] = {
        "seq": step.seq,
        "owner": step.owner,
        "device": step.device,
        "at": step.at,
        "event": _plain(step.event),
        "actions": [_plain(action) for action in step.actions],
    }
    if step.expert is not None:
        said["expert"] = step.expert
    if step.fault is not None:
        said["fault"] = step.fault
    return said


def encode(step: Step) -> bytes:
    """The step as one line."""
    return orjson.dumps(plain(step), option=orjson.OPT_APPEND_NEWLINE)


def decode(line: bytes | str) -> Step | None:
    """The step of a line; None for a line that holds none, such as the header. Raises ValueError
    for what is no line of this log."""
    said = orjson.loads(line)
    if not isinstance(said, dict):
        raise ValueError("a line of the log is a JSON object")
    if "log" in said:
        if (said["log"], said.get("version")) != (FORMAT, VERSION):
            raise ValueError(f"this is not a {FORMAT} of version {VERSION}")
        return None
    try:
        return Step(
            said["seq"],
            said["owner"],
            said["device"],
            said["at"],
            _made(said["event"]),
            tuple(_made(action) for action in said["actions"]),
            said.get("expert"),
            said.get("fault"),
        )
    except KeyError as error:
        raise ValueError(f"a step without {error}") from error


@dataclass(frozen=True, slots=True)
class Mismatch:
    """Where a replayed policy answered something else than the recorded one."""

    step: Step
    actions: tuple[Action, ...]
    fault: str | None = None


def replay(lines: Iterable[bytes | str], make_policy: Callable[[], DevicePolicy]) -> list[Mismatch]:
    """Feeds the recorded events, in order, through new policies, one an owner; returns every step
    that came out differently (after an owner's first one, the states differ, too).

    Raises ValueError for a recording that has lost its beginning (rotated away) or has gaps.
    """
    policies: dict[int, DevicePolicy] = {}
    mismatches: list[Mismatch] = []
    before = 0
    for line in lines:
        step = decode(line)
        if step is None:
            continue
        if step.seq != before + 1:
            raise ValueError(f"after step {before} comes step {step.seq}: what is between is gone")
        before = step.seq
        policy = policies.get(step.owner)
        if policy is None:
            policy = policies[step.owner] = make_policy()
        actions, error = answer(policy, step.event, step.at)
        fault = in_words(error)
        if (actions, fault) != (step.actions, step.fault):
            mismatches.append(Mismatch(step, actions, fault))
    return mismatches


def answer(
    policy: DevicePolicy, event: Event, now: float
) -> tuple[tuple[Action, ...], Exception | None]:
    """The policy's actions, or what it raised."""
    try:
        return tuple(policy.on(event, now)), None
    except Exception as error:  # a policy's bug must neither stop its device nor a replay
        return (), error


def in_words(error: Exception | None) -> str | None:
    return None if error is None else f"{type(error).__name__}: {error}"


@cache
def _kinds() -> Mapping[str, TypeAdapter[Any]]:
    return {
        kind.__name__.lower(): TypeAdapter(kind) for kind in (*get_args(Event), *get_args(Action))
    }


def _plain(said: Event | Action) -> dict[str, Any]:
    kind = type(said)
    values = {field.name: getattr(said, field.name) for field in fields(kind)}
    return {"kind": kind.__name__.lower(), **values}


def _made(said: Mapping[str, Any]) -> Any:
    values = dict(said)
    adapter = _kinds().get(values.pop("kind"))
    if adapter is None:
        raise ValueError(f"there is no event or action {said['kind']!r}")
    return adapter.validate_python(values)
