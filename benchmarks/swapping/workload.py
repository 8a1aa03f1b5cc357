"""Draws what one device is confronted with: experts, arrivals and running times. Knows no policy.

One cell of the grid is (experts, room, ρ, arrivals, seed):

- Experts' memory is 8 to 32 GB, uniform in steps of ½ GB; a load takes 1.5 s plus the memory at
  2 to 8 GB/s, drawn per expert; an unload takes 0.5 s plus a tenth of the load. Each single load
  and unload is then longer or shorter by a log-normal factor (σ = 0.1).
- The device's memory is `room` × the experts' mean, at least the largest expert.
- Popularity is Zipf (share of rank r ∝ 1/r), ranks being dealt at random.
- A call's running time is the recorded length of some answer of the recorded model that stands for
  its expert (../shared/data/zeroeval, characters / 4, cut at 1024 tokens as `max_tokens` would)
  over the speed measured on the embedded engine.
- ρ is the arrival rate over the swap-free capacity, and that is `in_flight` / (mean running time
  of the traffic): what one always loaded model would get through. With room for more, more
  windows run at once, so the same ρ is then a lighter load.
- `poisson`: independent arrivals. `bursty`: bursts start as a Poisson process; each is for one
  expert, holds a geometric number of calls (mean 8) and comes at eight times the mean rate.
- `max_wait_s` = 2 · Σ over experts (load + unload + 95th percentile of running times) /
  (room · (1 − ρ/room)): twice the cycle in which a device that serves `room` windows of experts
  in turn could load every expert once and still do all the work. It is the same for all
  policies and never tuned. Below one such cycle no policy, the optimum included, could serve all.
"""

from __future__ import annotations

import csv
import gzip
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from benchmarks.common import SHARED
from benchmarks.swapping.simulator import Job, Workload
from composer.scheduling.events import Model, Waiting

Floats = npt.NDArray[np.float64]
Arrivals = Literal["poisson", "bursty"]

TOKENS_PER_S = 167.0
"""Of one answer while eight run at once; the embedded engine with examples/tiny/bases/large, one
thread of this project's build machine (benchmarks/swapping/speed.py)."""

MAX_TOKENS = 1024
IN_FLIGHT = 8
QUEUE = 1_000_000  # never full: only bounds on waiting refuse
ZIPF = 1.0
BURST_CALLS = 8
BURST_RATE = 8.0
NOISE = 0.1
SLACK = 2.0


@dataclass(frozen=True, slots=True)
class Cell:
    """A point of the grid. `rho` is the load as a share of the swap-free capacity."""

    experts: int
    room: int
    rho: float
    arrivals: Arrivals
    seed: int = 0

    @property
    def name(self) -> str:
        return f"{self.experts} experts, room {self.room}, ρ {self.rho:g}, {self.arrivals}"


def grid(seed: int = 0) -> list[Cell]:
    """All cells of the issue's grid."""
    return [
        Cell(experts, room, rho, arrivals, seed)
        for experts in (4, 16, 64)
        for room in (1, 2, 4)
        for rho in (0.3, 0.6, 0.9)
        for arrivals in ("poisson", "bursty")
    ]


@cache
def recorded_lengths(table: str = "zeroeval") -> tuple[Floats, ...]:
    """Answer lengths in tokens, an array per recorded model. Raises SystemExit, with the remedy,
    where the shared data are missing."""
    file = SHARED / f"{table}.train.csv.gz"
    if not Path(file).exists():
        raise SystemExit(f"{file} is not there; put the shared routing data beside the repository")
    with gzip.open(file, "rt", encoding="utf-8", newline="") as text:
        rows = list(csv.DictReader(text))
    columns = [name for name in rows[0] if name.startswith("out_chars|")]
    return tuple(
        np.clip([float(row[name]) / 4 for row in rows if row[name]], 1, MAX_TOKENS)
        for name in columns
    )


def experts_of(cell: Cell, rng: np.random.Generator) -> tuple[tuple[Model, ...], list[Floats]]:
    """The models, and the running times in seconds that each one's calls are drawn from."""
    lengths = recorded_lengths()
    models, times = [], []
    for number in range(cell.experts):
        memory = float(rng.integers(16, 65)) / 2
        load = 1.5 + memory / rng.uniform(2.0, 8.0)
        run = lengths[rng.integers(len(lengths))] / TOKENS_PER_S
        times.append(run)
        models.append(
            Model(
                id=f"m{number:02d}",
                in_flight=IN_FLIGHT,
                queue=QUEUE,
                memory_gb=memory,
                load_s=round(load, 3),
                unload_s=round(0.5 + 0.1 * load, 3),
                run_s=round(float(run.mean()), 3),
                movable=True,
            )
        )
    return tuple(models), times


def memory_of(models: Sequence[Model], room: int) -> float:
    """The device's memory in GB."""
    sizes = [model.memory_gb for model in models]
    return max(room * sum(sizes) / len(sizes), max(sizes))


def popularity(experts: int, rng: np.random.Generator) -> Floats:
    """Shares (experts,) of the calls."""
    shares = 1 / np.arange(1, experts + 1) ** ZIPF
    return rng.permutation(shares / shares.sum())


def arrive(
    kind: Arrivals, n: int, rate: float, shares: Floats, rng: np.random.Generator
) -> tuple[Floats, npt.NDArray[np.int64]]:
    """Times (n,) in seconds, rising, and experts' numbers (n,)."""
    if kind == "poisson":
        return np.cumsum(rng.exponential(1 / rate, n)), rng.choice(len(shares), n, p=shares)
    sizes: list[int] = []
    while sum(sizes) < n:
        sizes.append(int(rng.geometric(1 / BURST_CALLS)))
    starts = np.cumsum(rng.exponential(BURST_CALLS / rate, len(sizes)))
    owners = rng.choice(len(shares), len(sizes), p=shares)
    times = np.concatenate(
        [
            start + np.cumsum(rng.exponential(1 / (BURST_RATE * rate), size))
            for start, size in zip(starts, sizes, strict=True)
        ]
    )
    experts = np.repeat(owners, sizes)
    order = np.argsort(times, kind="stable")[:n]
    return times[order], experts[order]


def make(cell: Cell, *, min_calls: int = 2500, max_calls: int = 100_000) -> Workload:
    """The cell's workload: at least `min_calls` and, up to `max_calls`, as many as arrive in
    twice `max_wait_s`."""
    rng = np.random.default_rng(
        [cell.experts, cell.room, round(100 * cell.rho), cell.arrivals == "bursty", cell.seed]
    )
    models, times = experts_of(cell, rng)
    memory = memory_of(models, cell.room)
    shares = popularity(cell.experts, rng)
    mean_run = float(sum(s * t.mean() for s, t in zip(shares, times, strict=True)))
    rate = cell.rho * IN_FLIGHT / mean_run
    tails = sum(float(np.percentile(t, 95)) for t in times)
    cycle = (sum(m.load_s + m.unload_s for m in models) + tails) / cell.room
    max_wait = SLACK * cycle / (1 - cell.rho / cell.room)
    n = min(max(min_calls, int(2 * max_wait * rate)), max_calls)
    when, who = arrive(cell.arrivals, n, rate, shares, rng)
    jobs = tuple(
        Job(
            Waiting(number, models[expert].id, at, deadline=at + max_wait),
            float(rng.choice(times[expert])),
        )
        for number, (at, expert) in enumerate(zip(when.tolist(), who.tolist(), strict=True))
    )
    noise = {m.id: tuple(np.exp(rng.normal(0, NOISE, 128)).tolist()) for m in models}
    return Workload(cell.name, models, memory, jobs, max_wait, noise=noise)


WINDOW_CALLS = 40
WINDOW_STEP_S = 0.01


def window(seed: int) -> Workload:
    """A workload of 40 calls, small enough for the exact optimum, drawn over the grid's ranges.

    Experts, sizes, costs, popularity, running times and both kinds of arrivals are as in the
    grid, but the calls come so sparsely that 10, 20 or 40 of them arrive in one `max_wait_s`:
    at the grid's rates 40 calls pass within one load and the optimum would be one load an expert.
    `max_wait_s` is 1½, 2 or 3 times Σ over the experts called (load + unload + 95th percentile of
    running times) / room; as many of the most popular experts are loaded at the start as fit; no
    in-flight window binds, and there is no noise. All times lie on a grid of 10 ms.
    """
    rng = np.random.default_rng([7, seed])
    experts = int(rng.choice([4, 16, 64]))
    room = min(int(rng.choice([1, 2, 4])), experts // 2)
    arrivals: Arrivals = "poisson" if rng.random() < 0.5 else "bursty"
    models, times = experts_of(Cell(experts, room, 0.0, arrivals, seed), rng)
    models = tuple(
        replace(
            model,
            in_flight=WINDOW_CALLS,
            load_s=round(model.load_s, 2),
            unload_s=round(model.unload_s, 2),
        )
        for model in models
    )
    shares = popularity(experts, rng)
    when, who = arrive(arrivals, WINDOW_CALLS, 1.0, shares, rng)
    cycle = sum(
        models[e].load_s + models[e].unload_s + float(np.percentile(times[e], 95))
        for e in set(who.tolist())
    )
    max_wait = round(float(rng.choice([1.5, 2.0, 3.0])) * cycle / room, 2)
    per_wait = int(rng.choice([10, 20, 40]))
    when = (when - when[0]) * max_wait * (WINDOW_CALLS / per_wait) / (when[-1] - when[0])
    memory = memory_of(models, room)
    resident, free = [], memory
    for expert in np.argsort(-shares, kind="stable"):
        if models[expert].memory_gb <= free:
            resident.append(models[expert].id)
            free -= models[expert].memory_gb
    jobs = tuple(
        Job(
            Waiting(number, models[e].id, round(at, 2), deadline=round(round(at, 2) + max_wait, 2)),
            max(WINDOW_STEP_S, round(float(rng.choice(times[e])), 2)),
        )
        for number, (at, e) in enumerate(zip(when.tolist(), who.tolist(), strict=True))
    )
    name = f"window {seed}: {experts} experts, room {room}, {arrivals}, {per_wait} calls per wait"
    return Workload(name, models, memory, jobs, max_wait, tuple(resident))
