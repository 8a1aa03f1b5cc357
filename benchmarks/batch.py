"""What the order of a batch is worth: one queue of questions to eight experts, in four orders.

    .venv/bin/python benchmarks/batch.py [--json FILE] [--quick]

2,000 held-out questions over eight of the tiny experts, each question to its own expert, on one
embedded engine, at temperature 0:

  one by one      as they arrive, one at a time, with one adapter loaded at a time
  mixed batches   as they arrive, the batch always full, its rows with whatever adapters they need
  grouped         expert by expert: load its adapter, run its questions in full batches, to the end
  grouped, mixed  expert by expert, the batch always full: the last rows of one expert run beside
    tails         the first of the next (what `composer batch` does)

Time is shown in two parts: *switching* is loading and dropping adapters (from disk, as they are
loaded in service), *answering* all the rest. Systems that keep all adapters loaded load them once,
which counts as switching too. Every system starts with no adapter loaded; how many of its answers
differ from the first system's is told. CPU seconds stand beside wall time, because other work on
the machine does not count there. The last three run three times in turn, and the middle run by CPU
seconds is shown; the first takes so much longer that it runs once. Ratios are to the last.
"""

from __future__ import annotations

import argparse
import asyncio
import random
from collections.abc import Callable, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import yaml

from benchmarks.common import add_arguments, progress, show
from composer.build import load
from composer.calling import call_of
from composer.engines.local import EmbeddedEngine
from composer.settings import Settings
from composer.types import Adapter, Call, Expert, Request, Sampling
from examples.tiny.tasks import SKILLS

ROOT = Path(__file__).resolve().parent.parent
WORDINGS = ROOT / "tests" / "data" / "unseen_wordings.yaml"
EXPERTS = 8
ROUNDS = 3
SERVER = "tiny-large"


@dataclass(frozen=True, slots=True)
class Question:
    """A rendered call, and what is right."""

    call: Call
    answer: str

    @property
    def adapter(self) -> Adapter:
        assert self.call.adapter is not None
        return self.call.adapter


@dataclass(slots=True)
class Run:
    """One system's time, in seconds, and its answers by question."""

    switching_s: float = 0.0
    switching_cpu_s: float = 0.0
    switches: int = 0
    wall_s: float = 0.0
    cpu_s: float = 0.0
    said: dict[str, str] = field(default_factory=dict)


class Bench:
    """One engine, on which the systems run one after another."""

    def __init__(self, engine: EmbeddedEngine, advance: Callable[[], None]) -> None:
        self.engine = engine
        self.run = Run()
        self._advance = advance

    async def load(self, adapters: Sequence[Adapter]) -> None:
        """These, and no others."""
        began, cpu = perf_counter(), process_time()
        await self.engine.retain(())
        await self.engine.prepare(adapters)
        self.run.switching_s += perf_counter() - began
        self.run.switching_cpu_s += process_time() - cpu
        self.run.switches += len(adapters)

    async def answer(self, question: Question) -> None:
        async with aclosing(self.engine.run(question.call)) as chunks:
            text = "".join([chunk.text async for chunk in chunks])
        self.run.said[question.call.id] = text
        self._advance()

    async def answer_all(self, questions: Sequence[Question]) -> None:
        """The batch kept full, in this order."""
        todo = iter(questions)

        async def worker() -> None:
            for question in todo:
                await self.answer(question)

        async with asyncio.TaskGroup() as tasks:
            for _ in range(self.engine.capacity.in_flight):
                tasks.create_task(worker())


System = Callable[[Bench, Sequence[Question]], Coroutine[Any, Any, None]]


async def one_by_one(bench: Bench, questions: Sequence[Question]) -> None:
    loaded = ""
    for question in questions:
        if question.adapter.digest != loaded:
            await bench.load([question.adapter])
            loaded = question.adapter.digest
        await bench.answer(question)


async def mixed_batches(bench: Bench, questions: Sequence[Question]) -> None:
    await bench.load(_adapters(questions))
    await bench.answer_all(questions)


async def grouped(bench: Bench, questions: Sequence[Question]) -> None:
    for _, group in groupby(_by_expert(questions), lambda q: q.call.expert):
        together = list(group)
        await bench.load([together[0].adapter])
        await bench.answer_all(together)


async def grouped_mixed_tails(bench: Bench, questions: Sequence[Question]) -> None:
    await bench.load(_adapters(questions))
    await bench.answer_all(_by_expert(questions))


SYSTEMS: dict[str, System] = {
    "one by one": one_by_one,
    "mixed batches": mixed_batches,
    "grouped": grouped,
    "grouped, mixed tails": grouped_mixed_tails,
}


def _adapters(questions: Sequence[Question]) -> list[Adapter]:
    return list({q.adapter.digest: q.adapter for q in questions}.values())


def _by_expert(questions: Sequence[Question]) -> list[Question]:
    return sorted(questions, key=lambda q: q.call.expert)


def ask(experts: Sequence[Expert], count: int, seed: int = 21) -> list[Question]:
    """`count` held-out questions, the experts drawn at random as traffic would bring them."""
    rng = random.Random(seed)
    wordings = yaml.safe_load(WORDINGS.read_text(encoding="utf-8"))
    items = {e.id: SKILLS[e.id].sample("test", count // len(experts) * 2, seed) for e in experts}
    made = []
    for number in range(count):
        expert = rng.choice(experts)
        item = items[expert.id][number % len(items[expert.id])]
        text = item.wording(rng.choice(wordings[expert.id]))
        request = Request(
            id=f"q{number}",
            model=expert.id,
            messages=({"role": "user", "content": text},),
            sampling=Sampling(max_tokens=48, temperature=0.0),
        )
        call = call_of(request, expert, number=0, messages=None, sampling=request.sampling)
        made.append(Question(call, item.answer))
    return made


async def measure(count: int) -> list[dict[str, object]]:
    catalog = load(Settings(experts=ROOT / "experts.yaml")).catalog
    experts = [
        e for e in catalog.experts.values() if e.server == SERVER and e.id in SKILLS and e.adapter
    ][:EXPERTS]
    questions = ask(experts, count)
    engine = EmbeddedEngine(SERVER, catalog.servers[SERVER].settings)
    await engine.start()
    turns = ["one by one", *(name for _ in range(ROUNDS) for name in list(SYSTEMS)[1:])]
    runs: dict[str, list[Run]] = {}
    try:
        with progress("questions", count * len(turns)) as advance:
            warm_up = Bench(engine, lambda: None)
            await mixed_batches(warm_up, questions[:64])
            for name in turns:
                bench = Bench(engine, advance)
                await engine.retain(())
                began, cpu = perf_counter(), process_time()
                await SYSTEMS[name](bench, questions)
                bench.run.wall_s, bench.run.cpu_s = perf_counter() - began, process_time() - cpu
                runs.setdefault(name, []).append(bench.run)
    finally:
        await engine.close()
    middle = {name: sorted(of, key=lambda r: r.cpu_s)[len(of) // 2] for name, of in runs.items()}
    return _table(middle, questions)


def _table(runs: dict[str, Run], questions: Sequence[Question]) -> list[dict[str, object]]:
    first, best = runs["one by one"], runs["grouped, mixed tails"]
    rows: list[dict[str, object]] = []
    for name, run in runs.items():
        differ = sum(run.said[q.call.id] != first.said[q.call.id] for q in questions)
        right = sum(run.said[q.call.id].strip() == q.answer for q in questions)
        rows.append(
            {
                "system": name,
                "questions": len(questions),
                "wall_s": round(run.wall_s, 2),
                "switching_s": round(run.switching_s, 2),
                "answering_s": round(run.wall_s - run.switching_s, 2),
                "cpu_s": round(run.cpu_s, 2),
                "switching_cpu_s": round(run.switching_cpu_s, 2),
                "answering_cpu_s": round(run.cpu_s - run.switching_cpu_s, 2),
                "adapters_loaded": run.switches,
                "wall_ratio": round(run.wall_s / best.wall_s, 2),
                "cpu_ratio": round(run.cpu_s / best.cpu_s, 2),
                "exact_match": round(right / len(questions), 4),
                "answers_that_differ": differ,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    args = parser.parse_args()
    table = asyncio.run(measure(200 if args.quick else 2000))
    show(table, args, title="A batch over eight tiny experts on one embedded engine")


if __name__ == "__main__":
    main()
