"""The owner of one device: feeds its policy what happens, in order, and does what it says.

Decides nothing itself; knows no engine beyond start and stop, and nothing of what a call says.
What crosses to the scheduler is plain data, so that an owner may live in another process.
Synchronous between two awaits and used from one event loop, so plain fields need no lock.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, deque
from collections.abc import Mapping
from typing import Any

from composer.errors import ComposerError, EngineUnavailable
from composer.scheduling.base import Lease, Place
from composer.scheduling.clock import Alarm, Clock, MomentsEnd
from composer.scheduling.events import (
    Action,
    Arrived,
    Configured,
    DevicePolicy,
    Event,
    Finished,
    Grant,
    Left,
    Load,
    Loaded,
    LoadFailed,
    Lost,
    Model,
    Refuse,
    Ticked,
    Unload,
    Unloaded,
    Waiting,
    Wake,
)
from composer.scheduling.log import EventLog, answer, in_words
from composer.scheduling.moves import Moves
from composer.scheduling.residency import Residency
from composer.scheduling.stats import CallStats
from composer.scheduling.tickets import Line, Ticket, refusal
from composer.types import Priority

log = logging.getLogger(__name__)

GRACE_S = 1.0
"""How long past its bound a call may still wait for the policy's own word. Beyond it the owner
refuses: nobody hangs, whatever a policy forgets."""


class DeviceOwner:
    """`number` tells it from other owners of a device of the same name in the log."""

    def __init__(
        self, device: str, number: int, policy: DevicePolicy, clock: Clock, events: EventLog
    ) -> None:
        self.device = device
        self.residency = Residency()
        self.calls = CallStats()
        self.faults = 0
        self.failures: dict[str, str] = {}
        self._number = number
        self._policy = policy
        self._clock = clock
        self._events = events
        self._moves = Moves(device, self._moved)
        self._lines: dict[str, Line] = {}
        self._configured: tuple[tuple[Model, ...], float] = ((), 0.0)
        self._waiting: dict[int, Ticket] = {}
        self._running: dict[int, Ticket] = {}
        self._leaving: set[int] = set()  # their callers are gone, and the policy is still to hear
        self._stays: Counter[str] = Counter()
        self._queue: deque[Event] = deque()
        self._stepping = False
        self._now = clock.now()
        self._wake: Alarm | None = None
        self._watch: Alarm | None = None
        self._watch_at = float("inf")
        self._closed = False

    # --- what the scheduler asks ---------------------------------------------------------

    def configure(self, places: Mapping[str, Place], memory_gb: float) -> None:
        """The device's servers from now on. One that is always there is taken to be there."""
        replaced = self._moves.place(places, self._calls_on)
        for id_ in replaced:
            self._lose(id_)
        models = tuple(place.model for place in places.values())
        for model in models:
            self._lines.setdefault(model.id, Line(model)).model = model
        for id_, line in list(self._lines.items()):
            if id_ not in places:
                line.model = None
                self._forget_if_empty(id_, line)
        if (models, memory_gb) != self._configured:
            known = {model.id for model in self._configured[0]}
            self._configured = (models, memory_gb)
            there = (
                model.id
                for model in models
                if not model.movable and model.id not in known and places[model.id].there
            )
            self._feed(Configured(models, memory_gb, tuple(there)))

    async def acquire(self, call: Waiting, expert: str) -> Lease:
        """Raises Overloaded or EngineUnavailable, as `Scheduler.acquire` says."""
        if self._closed:
            raise EngineUnavailable("the service is closing")
        ticket = Ticket(call, expert, self._clock.now())
        self.calls.recent.append(call.model)
        self._enqueue(ticket)
        self._feed(Arrived(call))
        if ticket.refusal is not None:
            raise ticket.refusal
        if ticket.lease is not None:
            return ticket.lease
        ticket.settled = asyncio.get_running_loop().create_future()
        self._watch_until(_watched(ticket))
        try:
            return await ticket.settled
        except BaseException:  # refused, cancelled, or its coroutine closed
            if self._dequeue(call.id) is not None:
                self.calls.left += 1
                self._tell_left(call.id)
            elif call.id in self._running and ticket.lease is not None:
                # Granted in the very step in which the caller was cancelled.
                self.release(call.id)
            raise

    def release(self, call: int, *, lost: bool = False) -> None:
        """Raises KeyError for a call that does not run."""
        ticket = self._running.pop(call)
        model = ticket.call.model
        line = self._lines[model]
        line.running -= 1
        self._forget_if_empty(model, line)
        if lost and self._stands(model) and ticket.stay == self._stays[model]:
            self._lose(model)  # first, or its place would go to the next call
        self._moves.finished(call)
        self._feed(Finished(call))

    def resident(self, server: str) -> bool:
        return self.residency.state(server) == "resident"

    @property
    def idle(self) -> bool:
        """Nothing configured, running or on the device: it may be dropped."""
        return not (self._configured[0] or self._running or self._waiting) and self._moves.idle

    async def close(self) -> None:
        """No loads any more; those who wait are refused; returns when nothing moves."""
        self._closed = True
        for alarm in (self._wake, self._watch):
            if alarm is not None:
                alarm.cancel()
        for ticket in list(self._waiting.values()):
            if self._dequeue(ticket.call.id) is not None:
                ticket.refuse(EngineUnavailable("the service is closing"))
                self._tell_left(ticket.call.id)
        await self._moves.close()

    def loads(self) -> dict[str, dict[str, int]]:
        """Per server of the device, what /health tells of it."""
        return {
            server: {
                "running": line.running,
                "waiting": line.waiting,
                "in_flight": line.model.in_flight,
                "queue": line.model.queue,
            }
            for server, line in self._lines.items()
            if line.model is not None
        }

    def queue(self) -> Mapping[tuple[str, str, Priority], int]:
        """Waiting calls by (server, expert, priority)."""
        return Counter((t.call.model, t.expert, t.priority) for t in self._waiting.values())

    def policy_snapshot(self) -> Any:
        """What the policy tells of itself, if it does."""
        tell = getattr(self._policy, "snapshot", None)
        return None if tell is None else tell()

    # --- events in, actions out ----------------------------------------------------------

    def _feed(self, event: Event) -> None:
        """One at a time: what an action causes at once waits for its turn."""
        self._queue.append(event)
        if self._stepping:
            return
        self._stepping = True
        try:
            while self._queue:
                self._step(self._queue.popleft())
        finally:
            self._stepping = False

    def _tell_left(self, call: int) -> None:
        self._leaving.add(call)
        self._feed(Left(call))

    def _step(self, event: Event) -> None:
        if isinstance(event, Left):
            if event.call not in self._leaving:
                return  # the policy ended it before its turn to hear came
            self._leaving.discard(event.call)
        now = self._now = max(self._now, self._clock.now())
        actions, error = answer(self._policy, event, now)
        expert = None
        if isinstance(event, Arrived) and event.call.id in self._waiting:
            expert = self._waiting[event.call.id].expert
        self._events.add(
            self._number, self.device, now, event, actions, expert=expert, fault=in_words(error)
        )
        self.residency.event(event, now)
        if error is not None:
            self._fault(f"{event} raised", error)
            if isinstance(event, Arrived) and (ticket := self._dequeue(event.call.id)):
                ticket.refuse(error)
        for action in actions:
            self._do(action, now)

    def _do(self, action: Action, now: float) -> None:
        match action:
            case Grant(call):
                self._grant(call, now)
            case Refuse():
                self._refuse(action)
            case Load(model) | Unload(model):
                self._move(action, model, now)
            case Wake(at):
                self._wake_at(at, now)

    def _grant(self, call: int, now: float) -> None:
        if call in self._leaving:
            self._leaving.discard(call)
            self._feed(Finished(call))
            return
        ticket = self._waiting.get(call)
        if ticket is None:
            self._fault(f"it granted call {call}, which does not wait")
            return
        self._dequeue(call)
        if ticket.left:
            self.calls.left += 1
            self._feed(Finished(call))  # its place is free again before anybody else acts
            return
        model = ticket.call.model
        ticket.stay = self._stays[model]
        self._running[call] = ticket
        self._lines[model].running += 1
        lease = Lease(call, model, ticket.expert, now - ticket.asked)
        self.calls.granted(ticket.priority, now, lease.queue_s)
        ticket.grant(lease)

    def _refuse(self, action: Refuse) -> None:
        if action.call in self._leaving:
            self._leaving.discard(action.call)
            return
        ticket = self._dequeue(action.call)
        if ticket is None:
            self._fault(f"it refused call {action.call}, which does not wait")
            return
        if action.reason == "full" and self._drop_those_who_left():
            self._enqueue(ticket)
            self._feed(Arrived(ticket.call))  # once more, behind their leaving
            return
        self.calls.refused[action.reason] += 1
        ticket.refuse(self._refusal(ticket, action.reason, action.retry_after_s))

    def _move(self, action: Load | Unload, model: str, now: float) -> None:
        if self._closed:
            return
        # Done whatever the state we know: an unanswered move leaves its policy waiting for ever.
        line = self._lines.get(model)
        known = None if line is None else line.model
        if not self._moves.movable(model) or (isinstance(action, Load) and known is None):
            self._fault(f"{action} of what moves already, or is not of this device")
            return
        self.residency.action(action, now)
        if isinstance(action, Unload):
            self._moves.unload(model)
        elif known is not None:
            self._moves.load(model, movable=known.movable)

    def _moved(self, event: Loaded | LoadFailed | Unloaded, message: str | None) -> None:
        if isinstance(event, Loaded):
            self._stays[event.model] += 1
        if message is None:
            self.failures.pop(event.model, None)
        else:
            self.failures[event.model] = message
        self._feed(event)

    def _wake_at(self, at: float, now: float) -> None:
        soon = at <= now
        if self._closed or (soon and isinstance(self._wake, MomentsEnd)):
            return  # a moment ends once, however much happens in it
        if self._wake is not None:
            self._wake.cancel()
        self._wake = MomentsEnd(self._tick) if soon else self._clock.call_at(at, self._tick)

    def _tick(self) -> None:
        if self._wake is not None:
            self._wake.cancel()
        self._wake = None
        if not self._closed:
            self._feed(Ticked())

    def _lose(self, model: str) -> None:
        self._stays[model] += 1
        self._feed(Lost(model))

    def _stands(self, model: str) -> bool:
        line = self._lines.get(model)
        return line is not None and line.model is not None and self.resident(model)

    # --- those who wait ------------------------------------------------------------------

    def _enqueue(self, ticket: Ticket) -> None:
        self._waiting[ticket.call.id] = ticket
        self._lines.setdefault(ticket.call.model, Line(None)).waiting += 1

    def _dequeue(self, call: int) -> Ticket | None:
        ticket = self._waiting.pop(call, None)
        if ticket is not None:
            line = self._lines[ticket.call.model]
            line.waiting -= 1
            self._forget_if_empty(ticket.call.model, line)
        return ticket

    def _forget_if_empty(self, model: str, line: Line) -> None:
        if line.model is None and not line.running and not line.waiting:
            del self._lines[model]

    def _calls_on(self, model: str) -> list[int]:
        return [id_ for id_, ticket in self._running.items() if ticket.call.model == model]

    def _drop_those_who_left(self) -> bool:
        """A cancelled `acquire` runs its own clean-up one loop step later; this is for now."""
        left = [call for call, ticket in self._waiting.items() if ticket.left]
        for call in left:
            self._dequeue(call)
            self.calls.left += 1
            self._tell_left(call)
        return bool(left)

    def _refusal(self, ticket: Ticket, reason: str, retry_after_s: float) -> ComposerError:
        model = ticket.call.model
        line = self._lines.get(model) or Line(None)
        return refusal(model, line, reason, retry_after_s, loaded=self.resident(model))

    # --- the safety net ------------------------------------------------------------------

    def _watch_until(self, at: float) -> None:
        if at < self._watch_at:
            if self._watch is not None:
                self._watch.cancel()
            self._watch_at = at
            self._watch = self._clock.call_at(at, self._look)

    def _look(self) -> None:
        """Refuses who waits past the bound and was forgotten.

        Where the event loop itself was late, the policy's own time may still be behind this one
        (an alarm that is due, too, or the end of a moment): it has its word first.
        """
        now = self._clock.now()
        self._watch, self._watch_at = None, float("inf")
        if self._overdue(now):
            self._tick()
        for ticket in self._overdue(now):
            self._dequeue(ticket.call.id)
            self._fault(f"it left call {ticket.call.id} waiting past its bound")
            self.calls.refused["late"] += 1
            ticket.refuse(self._refusal(ticket, "late", 0.0))
            self._tell_left(ticket.call.id)
        if left := [_watched(ticket) for ticket in self._waiting.values()]:
            self._watch_until(min(left))

    def _overdue(self, now: float) -> list[Ticket]:
        return [ticket for ticket in self._waiting.values() if _watched(ticket) <= now]

    def _fault(self, what: str, error: Exception | None = None) -> None:
        self.faults += 1
        log.error("device %s, a fault of its policy: %s", self.device, what, exc_info=error)


def _watched(ticket: Ticket) -> float:
    """Until when the policy may leave it waiting."""
    deadline = ticket.call.deadline
    return float("inf") if deadline is None else deadline + GRACE_S
