"""Routing and answering of the tiny experts on wordings that nobody trained on.

    .venv/bin/python benchmarks/tiny_routing.py [--json FILE] [--quick]

Every wording of tests/data/unseen_wordings.yaml is filled with held-out inputs and sent through
the whole service (filter, router, chooser, scheduler, embedded engine) at temperature 0. Beside
the default policy, on the same requests in the same run: the same router with names,
descriptions and skills taken out of the index, every expert alone (of which the best and the
mean, which is what a random choice expects), and the right expert each time, which is the most
that routing can reach. Intervals are bootstrapped over wordings, not over requests, because
requests of one wording are alike.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter

import numpy as np
import numpy.typing as npt
import yaml

from benchmarks.common import add_arguments, bootstrap, progress, show
from composer.build import build_ways, make_service
from composer.deciding import decide, way_of
from composer.generations import Generation
from composer.service import Service
from composer.settings import Settings
from composer.types import Component, Request, Sampling
from examples.tiny.tasks import SKILLS

ROOT = Path(__file__).resolve().parent.parent
WORDINGS = ROOT / "tests" / "data" / "unseen_wordings.yaml"
CONCURRENCY = 64

Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Question:
    """One request: who should answer it, what it says, what is right, and its wording's number."""

    skill: str
    text: str
    answer: str
    wording: int


def questions(skills: Sequence[str], inputs: int, most: int | None) -> list[Question]:
    """The unseen wordings of every skill (at most `most`), with `inputs` held-out inputs each."""
    wordings = yaml.safe_load(WORDINGS.read_text(encoding="utf-8"))
    made: list[Question] = []
    number = 0
    for skill in skills:
        items = SKILLS[skill].sample("test", inputs * len(wordings[skill]), seed=20)
        for i, wording in enumerate(wordings[skill][:most]):
            for j in range(inputs):
                # A fact table has fewer items than this asks for: they come round again.
                item = items[(i * inputs + j) % len(items)]
                made.append(Question(skill, item.wording(wording), item.answer, number))
            number += 1
    return made


async def answers(
    service: Service, asked: Sequence[Question], model: str, label: str
) -> tuple[list[str], list[str]]:
    """Who answered each question, and what they said."""
    gate = asyncio.Semaphore(CONCURRENCY)
    who, said = [""] * len(asked), [""] * len(asked)

    with progress(label, len(asked)) as advance:

        async def one(i: int) -> None:
            request = Request(
                id=f"{label}-{i}",
                model=model,
                messages=({"role": "user", "content": asked[i].text},),
                sampling=Sampling(max_tokens=48, temperature=0.0),
            )
            async with gate, await service.pipeline.answer(request) as answer:
                said[i] = "".join([chunk.text async for chunk in answer]).strip()
                who[i] = answer.outcome.experts[0] if answer.outcome.experts else ""
            advance()

        await asyncio.gather(*(one(i) for i in range(len(asked))))
    return who, said


async def decisions(
    generation: Generation, asked: Sequence[Question]
) -> tuple[list[str], list[float]]:
    """Whom the default policy chooses, one question after another, and how long each takes (ms)."""
    chosen, took = [], []
    for i, question in enumerate(asked):
        request = Request(
            id=f"decision-{i}", model="", messages=({"role": "user", "content": question.text},)
        )
        began = perf_counter()
        plan = await decide(request, generation, way_of(request, generation))
        took.append((perf_counter() - began) * 1000)
        chosen.append(plan.best)
    return chosen, took


async def examples_alone(service: Service) -> Generation:
    """The current generation, but the default policy knows the experts by their examples only."""
    generation = service.generations.current
    catalog = generation.catalog
    policy = catalog.policies[catalog.default_policy]
    router = Component(
        policy.router.name, policy.router.settings.model_copy(update={"sources": ("examples",)})
    )
    bare = replace(catalog, policies={policy.id: replace(policy, router=router)})
    return replace(generation, ways=await build_ways(bare, service.embedder))


async def measure(inputs: int, most: int | None) -> list[dict[str, object]]:
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(
            experts=ROOT / "experts.yaml",
            database_url=f"sqlite+aiosqlite:///{folder}/bench.db",
            journal=Path(folder) / "journal",
        )
        service = await asyncio.to_thread(make_service, settings)
        await service.start()
        try:
            return await _table(service, inputs, most)
        finally:
            await service.close()


async def _table(service: Service, inputs: int, most: int | None) -> list[dict[str, object]]:
    catalog = service.generations.current.catalog
    policy = catalog.policies[catalog.default_policy]
    experts = [e for e in policy.experts if e in SKILLS]
    asked = questions(experts, inputs, most)
    skill = np.array([q.skill for q in asked])
    right = [q.answer for q in asked]
    wording = np.array([q.wording for q in asked])

    def exact(said: Sequence[str]) -> Bools:
        return np.array([a == b for a, b in zip(said, right, strict=True)])

    # First, while no query's embedding is cached.
    _, took = await decisions(service.generations.current, asked)
    who, said = await answers(service, asked, "", "default policy")
    alone = {e: exact((await answers(service, asked, e, e))[1]) for e in experts}
    bare, _ = await decisions(await examples_alone(service), asked)

    correct = np.stack([alone[e] for e in experts])  # (E, n)
    column = {e: i for i, e in enumerate(experts)}
    best = max(experts, key=lambda e: float(alone[e].mean()))
    oracle = np.array([correct[column[s], i] for i, s in enumerate(skill)])
    nobody = np.zeros(len(asked), np.bool_)
    bare_exact = np.array(
        [correct[column[e], i] if e in column else nobody[i] for i, e in enumerate(bare)]
    )
    rows: list[tuple[str, npt.NDArray[np.float64], npt.NDArray[np.float64]]] = [
        ("composer (default policy)", (np.array(who) == skill).astype(float), exact(said) * 1.0),
        ("examples alone", (np.array(bare) == skill).astype(float), bare_exact * 1.0),
        (f"best single expert ({best})", (skill == best).astype(float), alone[best] * 1.0),
        ("random expert", np.full(len(asked), 1 / len(experts)), correct.mean(axis=0)),
        ("right expert each time", np.ones(len(asked)), oracle * 1.0),
    ]
    table: list[dict[str, object]] = []
    for name, routed, answered in rows:
        table.append(
            {
                "system": name,
                "questions": len(asked),
                **_with_interval("routing_accuracy", routed, wording),
                **_with_interval("exact_match", answered, wording),
                "decision_ms_p50": round(float(np.median(took)), 2) if name == rows[0][0] else None,
            }
        )
    _explain(asked, who, said)
    return table


def _with_interval(
    name: str, values: npt.NDArray[np.float64], groups: npt.NDArray[np.int64]
) -> dict[str, object]:
    low, high = bootstrap(values, groups=groups)
    return {
        name: round(float(values.mean()), 4),
        f"{name}_low": round(low, 4),
        f"{name}_high": round(high, 4),
    }


def _explain(asked: Sequence[Question], who: Sequence[str], said: Sequence[str]) -> None:
    """Every miss, so that the figure can be argued with."""
    for question, expert, answer in zip(asked, who, said, strict=True):
        if expert != question.skill or answer != question.answer:
            kind = "route " if expert != question.skill else "answer"
            print(f"  {kind} {question.text!r}: {expert} said {answer!r}, not {question.answer!r}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    args = parser.parse_args()
    began = perf_counter()
    table = asyncio.run(measure(*((1, 5) if args.quick else (4, None))))
    show(table, args, title="Tiny experts on unseen wordings, held-out inputs")
    print(f"{perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
