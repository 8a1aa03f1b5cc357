"""What a lease costs: acquire and release while many calls wait.

    python benchmarks/scheduler.py [--json FILE] [--quick]

One process, one event loop. So many callers ask for leases on one server over and over, that
beside those that run, `waiting` always wait; each gives its lease back at its next turn. `us` is
processor time per acquire and release (wake-ups of tasks and the writing thread included, so that
a busy machine changes little), the best of three runs. Policies: `line` is a bare queue, so that
its row is what the driver costs; `swap` is the service's own. Calls have a bound of a minute.
`log` is whether every event goes to a file, too.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from collections import deque
from collections.abc import Callable
from pathlib import Path
from time import process_time

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import Row, add_arguments, progress, show
from composer.scheduling.base import Place
from composer.scheduling.events import (
    Action,
    Arrived,
    Configured,
    DevicePolicy,
    Event,
    Finished,
    Grant,
    Left,
    Model,
)
from composer.scheduling.policy import SwapPolicy
from composer.scheduling.scheduler import DeviceScheduler
from composer.types import Call, Sampling

IN_FLIGHT = 64
EXPERTS = 100


class Line:
    """Grants in the order of arrival, on one server."""

    def __init__(self) -> None:
        self.room = 0
        self.line: deque[int] = deque()

    def on(self, event: Event, now: float) -> list[Action]:
        match event:
            case Configured(models):
                self.room = models[0].in_flight
            case Arrived(call):
                self.line.append(call.id)
            case Left(call):
                self.line.remove(call)
            case Finished():
                self.room += 1
            case _:
                pass
        said: list[Action] = []
        while self.room and self.line:
            self.room -= 1
            said.append(Grant(self.line.popleft()))
        return said


class Still:
    """A server that is always there."""

    async def start(self) -> None: ...

    async def stop(self) -> None: ...


async def lease_us(
    make_policy: Callable[[], DevicePolicy], waiting: int, leases: int, log: Path | None
) -> float:
    """Microseconds of processor time per lease."""
    scheduler = DeviceScheduler(make_policy, log=log)
    model = Model("server", in_flight=IN_FLIGHT, queue=10 * (waiting + 1), run_s=0.001)
    scheduler.configure({"server": Place("device", model, Still())}, {})
    left = leases

    async def caller(number: int) -> None:
        nonlocal left
        expert = f"expert-{number % EXPERTS}"
        while left > 0:
            left -= 1
            call = Call(
                "id", expert, "server", None, (), "hi", Sampling(), 100,
                arrived=scheduler.now(), max_wait_s=60.0,
            )  # fmt: skip
            lease = await scheduler.acquire(call)
            await asyncio.sleep(0)
            scheduler.release(lease)

    began = process_time()
    await asyncio.gather(*(caller(i) for i in range(waiting + IN_FLIGHT)))
    await scheduler.close()
    return (process_time() - began) / leases * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    args = parser.parse_args()
    leases, runs = (5_000, 1) if args.quick else (30_000, 3)
    policies: dict[str, Callable[[], DevicePolicy]] = {"line": Line, "swap": SwapPolicy}
    cases = [
        (policy, waiting, log)
        for policy in policies
        for waiting in (0, 100, 1_000)
        for log in (False, True)
    ]
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder, progress("leases", len(cases) * runs) as step:
        file = Path(folder) / "scheduler.jsonl"
        for policy, waiting, log in cases:
            best = float("inf")
            for _ in range(runs):
                work = lease_us(policies[policy], waiting, leases, file if log else None)
                best = min(best, asyncio.run(work))
                step()
            rows.append({"policy": policy, "waiting": waiting, "log": str(log), "us": best})
    show(rows, args, title=f"A lease, {IN_FLIGHT} calls in flight")


if __name__ == "__main__":
    main()
