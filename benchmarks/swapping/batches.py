"""Random batches of two-stage jobs, and how others would order their loads. Knows no search."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from benchmarks.swapping.workload import ZIPF
from composer.scheduling.batch_order import ModelCost

Chain = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Batch:
    """Jobs in order of arrival, each a chain of models."""

    jobs: tuple[Chain, ...]
    models: dict[str, ModelCost]
    memory_gb: float
    resident: tuple[str, ...]

    @property
    def chains(self) -> dict[Chain, int]:
        counts: dict[Chain, int] = {}
        for chain in self.jobs:
            counts[chain] = counts.get(chain, 0) + 1
        return counts


def batch(seed: int) -> Batch:
    """4 to 12 models of unequal memory (8 to 32 GB) and load (1.5 s + memory at 2 to 8 GB/s, as
    in the grid), room for 2, 3 or 4 of mean size; 2 to 6 jobs a model, 4 of 5 with two stages,
    models by Zipf; a random fitting set is resident."""
    rng = np.random.default_rng([11, seed])
    n = int(rng.choice([4, 6, 8, 10, 12]))
    names = [f"m{i:02d}" for i in range(n)]
    sizes = rng.integers(16, 65, n) / 2
    models = {
        name: ModelCost(round(1.5 + size / rng.uniform(2, 8), 2), float(size))
        for name, size in zip(names, sizes, strict=True)
    }
    memory = max(int(rng.choice([2, 3, 4])) * float(sizes.mean()), float(sizes.max()))
    shares = 1 / np.arange(1, n + 1) ** ZIPF
    shares = rng.permutation(shares / shares.sum())
    jobs = []
    for _ in range(n * int(rng.integers(2, 7))):
        chain = [str(rng.choice(names, p=shares))]
        if rng.random() < 0.8:
            chain.append(str(rng.choice(names, p=shares)))
        jobs.append(tuple(chain))
    resident: list[str] = []
    free = memory
    for name in rng.permutation(names):
        if models[name].memory_gb <= free and rng.random() < 0.7:
            resident.append(str(name))
            free -= models[name].memory_gb
    return Batch(tuple(jobs), models, memory, tuple(resident))


def arrival_order(batch: Batch) -> float:
    """Seconds of loading when the jobs are done one after the other, the least recently used
    model making room."""
    return _run(batch, (model for chain in batch.jobs for model in chain))


def grouped(batch: Batch) -> float:
    """Seconds of loading when all first stages are done, grouped by model, and then all second
    ones; within each, models that are resident come first and then those with the most jobs."""
    calls: list[str] = []
    inside = set(batch.resident)
    for stage in range(max(map(len, batch.jobs))):
        counts: dict[str, int] = {}
        for chain in batch.jobs:
            if len(chain) > stage:
                counts[chain[stage]] = counts.get(chain[stage], 0) + 1
        order = sorted(counts, key=lambda m: (m not in inside, -counts[m], m))
        calls += order
        inside = {order[-1]}
    return _run(batch, calls)


def _run(batch: Batch, calls: Iterable[str]) -> float:
    inside = list(batch.resident)  # the least recently used first
    seconds = 0.0
    for model in calls:
        if model in inside:
            inside.remove(model)
        else:
            seconds += batch.models[model].load_s
            while _taken(batch, [*inside, model]) > batch.memory_gb + 1e-9:
                del inside[0]
        inside.append(model)
    return seconds


def _taken(batch: Batch, names: Iterable[str]) -> float:
    return sum(batch.models[name].memory_gb for name in names)
