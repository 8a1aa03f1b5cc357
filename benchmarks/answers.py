"""What the answers of experts asked first bring to routing: two-stage policies on recorded answers.

    python benchmarks/answers.py [--only TABLE/POOL …] [--split SPLIT]

A policy asks up to three experts first (the probes), hears their answers, and then keeps one of
these or asks one expert more. "Agreement" keeps an answer that all probes gave, and else routes on.
"Learnt" predicts for each expert whether it is right from the router's scores, which probes agree,
which gave no answer, and how long the answers are, and takes the best of quality − weight · cost,
where keeping costs nothing more. "No probes" is the router alone, at all weights.

Within a budget each way takes the policy (probes and weight) that earned most on other folds of
train: router, second stage and choice are all cross-fitted there. The judged split is looked at
once, with the policies chosen on all of train. Costs are US dollars where a pool is priced, else
calls. Prints the Markdown of benchmarks/results/answers.md; some ten minutes of one core.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from itertools import combinations
from pathlib import Path

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import SHARED, progress
from composer.errors import ComposerError
from composer.routing.families import FAMILIES
from composer.routing.outcomes import Outcomes
from composer.strategies.extract import make_extractor
from router_training.crossfit import folds_by_stem
from router_training.data import load
from router_training.embedding import Embedding, open_embedding
from router_training.intervals import Interval, paired
from router_training.pools import BESIDE, read_pools
from router_training.split import parts
from router_training.tables import read_table
from router_training.train import Workshop
from router_training.votes import numbered

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

POOLS = {
    "zeroeval/priced": "literal",
    "mmlu_pro/priced": "choice",
    "zeroeval/small": "literal",
    "zeroeval/without_o1_mini": "literal",
    "mmlu_pro/small": "choice",
    "mmlu_pro/all": "choice",
}
SHARES = (0.05, 0.10, 0.25, 0.50, 1.00)
"""Of the best single expert's mean cost, where a pool is priced."""
CALLS = (1.0, 1.5, 2.0, 2.5, 3.0)
MOST_PROBES = 3
PROBES = 6
"""Experts that may be asked first: the cheapest, or the best where all cost the same."""
WEIGHTS = 40
RIDGE = 30.0
WAYS = ("no probes", "agreement", "learnt")


@dataclass(frozen=True, slots=True)
class Questions:
    """One split as policies see it. `quality` (n, E) is expected by a router that has not seen the
    question, `right` (n, E) what was earned, `cost` (n, E) what a call costs, `answer` (n, E)
    numbers equal where answers are and −1 for none, `length` (n, E) standardised log characters."""

    quality: Floats
    right: Floats
    cost: Floats
    answer: Ints
    length: Floats
    group: Ints

    def rows(self, chosen: Ints) -> Questions:
        own = (getattr(self, name)[chosen] for name in self.__slots__)
        return Questions(*own)


@dataclass(frozen=True, slots=True)
class Earned:
    """What policies earned and cost, question by question: both (P, n). `name` of each."""

    names: tuple[tuple[tuple[int, ...], int], ...]
    value: npt.NDArray[np.float32]
    cost: npt.NDArray[np.float32]

    def best(self, budget: float, rows: Ints | slice = slice(None)) -> int:
        """The policy that earned most of those that cost no more on average; the cheapest where
        all cost more."""
        cost = self.cost[:, rows].mean(axis=1, dtype=np.float64)
        value = self.value[:, rows].mean(axis=1, dtype=np.float64)
        within = cost <= budget * (1 + 1e-9)
        return int(np.where(within, value, -1).argmax() if within.any() else cost.argmin())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, default=SHARED, help="folder of the shared tables")
    parser.add_argument("--only", nargs="+", choices=POOLS, default=list(POOLS))
    parser.add_argument("--split", default="dev", help="judged on TABLE.SPLIT.csv.gz")
    parser.add_argument("--family", choices=FAMILIES, default="kernel", help="the router's")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        embedding = open_embedding()
        told = [one(args, embedding, pool) for pool in args.only]
    except ComposerError as error:
        sys.exit(str(error))
    command = " ".join(["python benchmarks/answers.py", *sys.argv[1:]])
    print(f"# Routing by the answers of experts asked first\n\n    {command}\n")
    print(f"Measured {date.today()}.\n")
    print("\n".join(told), end="")


def one(args: argparse.Namespace, embedding: Embedding, name: str) -> str:
    table, pool = name.split("/")
    experts = read_pools(args.data / BESIDE)[table][pool]
    files = [args.data / f"{table}.{split}.csv.gz" for split in ("train", args.split)]
    priced = pool == "priced"
    encode = embedding.kept.encode
    with progress(name, 3) as step:
        workshop = Workshop(load(files[0], experts=experts).outcomes, [args.family], encode,
                            seed=args.seed)  # fmt: skip
        chosen = workshop.choose(args.family)
        model = workshop.model(chosen, embedding.stamp, source=files[0].name)
        judged_quality = model.score(load(files[1], experts=experts).outcomes.text, encode).quality
        step()
        train, scale = questions(files[0], experts, POOLS[name], chosen.quality, priced, None)
        judged, _ = questions(files[1], experts, POOLS[name], judged_quality, priced, scale)
        fold = folds_by_stem(workshop.outcomes, args.seed)
        first = probes(train, priced)
        seen = {way: crossfitted(train, fold, first, way) for way in WAYS}
        step()
        later = {way: earned(train, judged, first, way) for way in WAYS}
        step()
    best = int(train.right.mean(axis=0).argmax())
    return section(name, priced, experts, best, train, judged, fold, seen, later, args.seed)


def questions(
    file: Path,
    experts: Sequence[str],
    extractor: str,
    quality: npt.NDArray[np.floating],
    priced: bool,
    scale: tuple[Floats, Floats] | None,
) -> tuple[Questions, tuple[Floats, Floats]]:
    """The file's, and by what lengths were standardised: that of train, for the other split."""
    data = load(file, experts=experts)
    outcomes: Outcomes = data.outcomes
    assert data.answers is not None
    assert outcomes.known.all(), "every expert answered every question of these tables"
    columns = read_table(file).columns
    chars = np.array([[float(c or 0) for c in columns[f"out_chars|{e}"]] for e in experts]).T
    length = np.log1p(chars)
    scale = scale or (length.mean(axis=0), length.std(axis=0) + 1e-6)
    own = Questions(
        quality.astype(np.float64),
        outcomes.quality.astype(np.float64),
        outcomes.cost.astype(np.float64) if priced else np.ones(quality.shape),
        numbered(data.answers, make_extractor(extractor, None)),
        (length - scale[0]) / scale[1],
        outcomes.group,
    )
    return own, scale


def probes(train: Questions, priced: bool) -> list[tuple[int, ...]]:
    """The sets of experts that may be asked first."""
    by = train.cost.mean(axis=0) if priced else -train.right.mean(axis=0)
    able = np.argsort(by, kind="stable")[:PROBES].tolist()
    return [s for size in range(1, MOST_PROBES + 1) for s in combinations(able, size)]


def features(own: Questions, first: tuple[int, ...]) -> Floats:
    """(n, F) of what is known once these have answered."""
    columns = [*own.quality.T]
    mean = own.quality.mean(axis=1)
    for a, b in combinations(first, 2):
        agree = ((own.answer[:, a] == own.answer[:, b]) & (own.answer[:, a] >= 0)).astype(float)
        columns += [agree, agree * mean, agree * own.quality[:, a], agree * own.quality[:, b]]
    for probe in first:
        silent = (own.answer[:, probe] < 0).astype(float)
        long = own.length[:, probe]
        columns += [silent, silent * mean, long, long**2, long * own.quality[:, probe], long * mean]
    return np.stack([np.ones(len(mean)), *columns], axis=1)


def corrected(train: Questions, other: Questions, first: tuple[int, ...]) -> Floats:
    """(n, E) of `other`: whether each expert is right, the router's score and a ridge regression
    of what it misses on the features, fitted on `train`."""
    x = features(train, first)
    center, spread = x.mean(axis=0), x.std(axis=0)
    spread[spread < 1e-9] = 1.0
    center[0], spread[0] = 0.0, 1.0
    x = (x - center) / spread
    penalty = np.diag([0.0] + [RIDGE] * (x.shape[1] - 1))
    weights = np.linalg.solve(x.T @ x + penalty, x.T @ (train.right - train.quality))
    return other.quality + (features(other, first) - center) / spread @ weights


def choices(
    train: Questions, other: Questions, first: list[tuple[int, ...]], way: str
) -> Iterator[tuple[tuple[int, ...], int, Ints]]:
    """Each policy of a way with whom it takes the answer from (n,). Cost is expected to be each
    expert's mean on train."""
    expected = train.cost.mean(axis=0)
    weights = [0.0, *(np.geomspace(1e-3, 1e3, WEIGHTS - 1) / expected.mean())]
    for probed in [()] if way == "no probes" else first:
        if way == "agreement" and len(probed) < 2:
            continue
        free = expected.copy()
        free[list(probed)] = 0.0
        quality = corrected(train, other, probed) if way == "learnt" else other.quality
        for number, weight in enumerate(weights):
            taken = (quality - weight * free).argmax(axis=1)
            if way == "agreement":
                answers = other.answer[:, list(probed)]
                agreed = (answers == answers[:, :1]).all(axis=1) & (answers[:, 0] >= 0)
                taken = np.where(agreed, probed[0], taken)
            yield probed, number, taken


def earned(train: Questions, other: Questions, first: list[tuple[int, ...]], way: str) -> Earned:
    names, value, cost = [], [], []
    rows = np.arange(len(other.group))
    for probed, number, taken in choices(train, other, first, way):
        more = np.where(np.isin(taken, probed), 0.0, other.cost[rows, taken])
        names.append((probed, number))
        value.append(other.right[rows, taken].astype(np.float32))
        cost.append((other.cost[:, list(probed)].sum(axis=1) + more).astype(np.float32))
    return Earned(tuple(names), np.stack(value), np.stack(cost))


def crossfitted(train: Questions, fold: Ints, first: list[tuple[int, ...]], way: str) -> Earned:
    """Each fold's by second stages fitted on the others."""
    whole: Earned | None = None
    for seen, held in parts(fold):
        own = earned(train.rows(seen), train.rows(held), first, way)
        if whole is None:
            empty = np.empty((len(own.names), len(fold)), np.float32)
            whole = Earned(own.names, empty, empty.copy())
        whole.value[:, held], whole.cost[:, held] = own.value, own.cost
    assert whole is not None
    return whole


def chosen_apart(own: Earned, fold: Ints, budget: float) -> tuple[Floats, Floats]:
    """(n,) earned and spent by the policies that are best on the other folds."""
    value, cost = np.empty(len(fold)), np.empty(len(fold))
    for seen, held in parts(fold):
        policy = own.best(budget, seen)
        value[held], cost[held] = own.value[policy, held], own.cost[policy, held]
    return value, cost


def section(
    name: str,
    priced: bool,
    experts: Sequence[str],
    best: int,
    train: Questions,
    judged: Questions,
    fold: Ints,
    seen: dict[str, Earned],
    later: dict[str, Earned],
    seed: int,
) -> str:
    single = float(train.cost[:, best].mean())
    there = float(judged.cost[:, best].mean())
    budgets = [share * single for share in SHARES] if priced else list(CALLS)
    heads = [f"{share:.0%}" for share in SHARES] if priced else [f"{c:g} calls" for c in CALLS]
    lines = [
        f"## {name}: {len(experts)} experts\n",
        f"{len(train.group)} questions fitted on, {len(judged.group)} judged; the best single "
        f"expert, {experts[best]}, has {train.right[:, best].mean():.1%} there and "
        f"{judged.right[:, best].mean():.1%} here. Accuracy, %, and in brackets what was spent"
        + (", in % of the best single's cost.\n" if priced else ", in calls.\n"),
    ]
    for title, whole in (("Cross-fitted on train", True), ("Judged", False)):
        lines += [f"{title}:\n", "| way | " + " | ".join(heads) + " |", "|---" * 6 + "|"]
        unit = (single if whole else there) / 100 if priced else 1.0
        alone: list[Floats] = []
        for way in WAYS:
            cells = []
            for number, budget in enumerate(budgets):
                if whole:
                    value, cost = chosen_apart(seen[way], fold, budget)
                else:
                    policy = seen[way].best(budget)
                    value = later[way].value[policy].astype(np.float64)
                    cost = later[way].cost[policy].astype(np.float64)
                cell = f"{100 * value.mean():.2f} [{cost.mean() / unit:.3g}]"
                if way == WAYS[0]:
                    alone.append(value)
                else:
                    group = train.group if whole else judged.group
                    cell += f" {_told(paired(100 * (value - alone[number]), group, seed=seed))}"
                cells.append(cell)
            lines.append(f"| {way} | " + " | ".join(cells) + " |")
        lines.append("")
    if priced:
        lines += at_the_best(seen, later, best, train, judged)
    return "\n".join([*lines, ""])


def at_the_best(
    seen: dict[str, Earned],
    later: dict[str, Earned],
    best: int,
    train: Questions,
    judged: Questions,
) -> list[str]:
    """What the best single expert's accuracy costs, by the cheapest policy that has it on train."""
    lines = [
        "What the best single expert's accuracy costs, by the cheapest policy that has it on train:"
        "\n",
        "| way | probes | cost on train, % | cost judged, % | accuracy over the best single's |",
        "|---|---|---|---|---|",
    ]
    wanted = train.right[:, best].mean()
    for way in WAYS:
        value = seen[way].value.mean(axis=1, dtype=np.float64)
        cost = seen[way].cost.mean(axis=1, dtype=np.float64)
        if not (value >= wanted).any():
            lines.append(f"| {way} | – | – | – | – |")
            continue
        policy = int(np.where(value >= wanted, cost, np.inf).argmin())
        share = cost[policy] / train.cost[:, best].mean()
        spent = later[way].cost[policy].astype(np.float64) / judged.cost[:, best].mean()
        over = later[way].value[policy] - judged.right[:, best]
        lines.append(
            f"| {way} | {len(seen[way].names[policy][0])} | {100 * share:.1f} "
            f"| {_told(paired(100 * spent, judged.group))} "
            f"| {_told(paired(100 * over, judged.group), sign='+')} |"
        )
    return [*lines, ""]


def _told(interval: Interval | None, sign: str = "+") -> str:
    assert interval is not None
    return f"{interval.mean:{sign}.2f} ({interval.low:+.2f} to {interval.high:+.2f})"


if __name__ == "__main__":
    main()
