"""Which few of many experts a task needs: evaluations spent, and what is lost by not making all.

    python benchmarks/selection.py [--split dev] [--examples 64] [--draws N] [--only …]

Each benchmark or category of a table is a task; K examples of it are drawn from the train file, and
what is kept is judged by its mean score on the task's questions of the judged split. Beside
`router-training select` (defaults): all candidates on all K, all on as few examples as cost the
same, candidates drawn at random, and those that turn out best on the judged questions. The last
table is a pool of 150 adapters, one for each intent of clinc150, of which a task needs one, with
and without descriptions (the intents' names). Prints Markdown.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import SHARED, bootstrap, progress
from router_training.data import load
from router_training.embedding import open_embedding
from router_training.pools import read_pools
from router_training.selection import Selection, select
from router_training.suitability import nearness
from router_training.tables import read_table

POOLS = ("mix10/all", "zeroeval/all", "mmlu_pro/all")
INTENTS = "clinc150/intents"
KEEP = (1, 3)
LEAST = 20
"""Judged questions that a task needs."""

Values = npt.NDArray[np.float64]


def picked(scores: Values, **given: Any) -> tuple[list[int], Selection]:
    """`select` on recorded scores (E, K)."""
    names = [str(e) for e in range(len(scores))]

    async def read(expert: str, rows: Sequence[int]) -> list[float | None]:
        return [float(score) for score in scores[int(expert), list(rows)]]

    found = asyncio.run(select(names, scores.shape[1], read, **given))
    return [int(expert) for expert in found.kept], found


def best(scores: Values, keep: int) -> list[int]:
    return [int(e) for e in np.argsort(-scores.mean(axis=1), kind="stable")[:keep]]


def pool_rows(args: argparse.Namespace, name: str) -> list[str]:
    table, _, pool = name.partition("/")
    experts = read_pools(args.data / "pools.json")[table][pool]
    train = load(args.data / f"{table}.train.csv.gz", experts=experts).outcomes
    judged = load(args.data / f"{table}.{args.split}.csv.gz", experts=experts).outcomes
    keys = ["/".join(pair) for pair in zip(train.benchmark, train.category, strict=True)]
    other = ["/".join(pair) for pair in zip(judged.benchmark, judged.category, strict=True)]
    tasks = [t for t in sorted(set(keys)) if other.count(t) >= LEAST and keys.count(t) >= LEAST]
    rng = np.random.default_rng(args.seed)
    lines = []
    with progress(name, len(KEEP) * len(tasks) * args.draws) as step:
        for keep in KEEP:
            rows: list[list[float]] = []
            owner: list[int] = []
            for number, task in enumerate(tasks):
                own = np.flatnonzero(np.array(keys) == task)
                there = judged.quality[np.array(other) == task].mean(axis=0)  # (E,)
                for draw in range(args.draws):
                    some = rng.permutation(own)[: args.examples]
                    scores = train.quality[some].T.astype(np.float64)  # (E, K)
                    kept, found = picked(scores, keep=keep, seed=draw)
                    same = max(1, round(found.evaluations / len(experts)))
                    every = best(scores, keep)
                    rows.append(
                        [
                            found.evaluations / found.exhaustive,
                            there[kept].mean(),
                            there[every].mean(),
                            there[best(scores[:, :same], keep)].mean(),
                            there.mean(),
                            np.sort(there)[-keep:].mean(),
                            found.confidence,
                            found.regret,
                        ]
                    )
                    owner.append(number)
                    step()
            spent, ours, every_, same_, random, top, sure, regret = np.array(rows).T
            gap = _around(100 * (every_ - ours), owner)
            even = _around(100 * (ours - same_), owner)
            lines.append(
                f"| {name} | {len(experts)} | {len(tasks)} | {keep} | {100 * spent.mean():.0f} % | "
                f"{100 * ours.mean():.1f} | {100 * every_.mean():.1f} | {100 * same_.mean():.1f} | "
                f"{100 * random.mean():.1f} | {100 * top.mean():.1f} | {gap} | {even} | "
                f"{100 * sure.mean():.0f} % | {100 * regret.mean():.1f} |"
            )
    return lines


def _around(values: Values, owner: Sequence[int]) -> str:
    low, high = bootstrap(values, groups=owner)
    return f"{values.mean():+.2f} [{low:+.2f}, {high:+.2f}]"


def intents(args: argparse.Namespace) -> list[str]:
    """Outcomes by decree: an adapter is right for the queries of its intent, and for no other."""
    columns = read_table(args.data / "clinc150.train.csv.gz").columns
    intent = np.array([str(one) for one in columns["intent"]])
    query = [str(one) for one in columns["query"]]
    names = [str(one) for one in np.unique(intent) if one != "oos"]
    rng = np.random.default_rng(args.seed)
    encode = open_embedding().kept.encode
    claims = [[name.replace("_", " ")] for name in names]
    tasks = rng.permutation(len(names))[:30]
    found: dict[str, list[tuple[float, bool]]] = {"with descriptions": [], "without": []}
    with progress(INTENTS, len(tasks)) as step:
        for task in tasks:
            own = rng.permutation(np.flatnonzero(intent == names[task]))[:16]
            scores = np.zeros((len(names), len(own)))
            scores[task] = 1
            near = nearness(claims, [query[i] for i in own], encode)
            for way, similarity in (("with descriptions", near), ("without", None)):
                kept, told = picked(scores, keep=1, similarity=similarity)
                found[way].append((told.evaluations / told.exhaustive, kept == [task]))
            step()
    lines = []
    for way, every in found.items():
        spent, right = np.array(every, np.float64).T
        least = "2" if way == "with descriptions" else "4"
        lines.append(
            f"| {way} | {100 * spent.mean():.1f} % | {100 * right.mean():.0f} % | {least} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, default=SHARED, help="folder of the shared tables")
    parser.add_argument("--split", default="dev", help="the part that is judged on")
    parser.add_argument("--examples", type=int, default=64, help="K")
    parser.add_argument("--draws", type=int, default=5, help="of the examples of each task")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=(*POOLS, INTENTS))
    args = parser.parse_args()
    wanted = args.only or (*POOLS, INTENTS)
    command = " ".join(["python benchmarks/selection.py", *sys.argv[1:]])
    print(f"# Selecting experts for a task\n\n    {command}\n")
    print(
        f"Measured {date.today()}; {args.draws} draws of at most {args.examples} examples of each "
        "task. Mean scores on the judged questions, per cent; 95 % bootstrap intervals over tasks "
        "in brackets. `select` with its defaults: confidence 90 %, tolerance 0.5 points.\n"
    )
    print(
        "| pool | experts | tasks | kept | evaluations | select | all of them | as many, spread "
        "evenly | at random | best there | lost against all | gained over even | said to be sure | "
        "expected loss |\n|---|---|---|---|---|---|---|---|---|---|---|---|---|---|"
    )
    for name in wanted:
        if name != INTENTS:
            print("\n".join(pool_rows(args, name)), flush=True)
    if INTENTS in wanted:
        print(
            "\n150 adapters of clinc150's intents, 16 examples of one:\n\n"
            "| | evaluations | the right one kept | examples that all are tried on |\n"
            "|---|---|---|---|"
        )
        print("\n".join(intents(args)), flush=True)


if __name__ == "__main__":
    main()
