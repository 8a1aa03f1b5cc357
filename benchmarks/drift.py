"""Two experts exchange quality mid-stream: what each way of learning loses, how soon it recovers.

    python benchmarks/drift.py [--quick] [--table mix10] [--split dev] [--json FILE]

Replays real outcomes. The base router (clusters over embeddings, calibrated by nothing else) is
fitted on train, once. Questions of the split, drawn with replacement, then come as a stream, and
from its middle on the best single expert and the worst one exchange their outcomes. Feedback comes
in pages of 20 requests, as a service would see it. Regret is counted against the same base router
told of the exchange, whose two columns are exchanged with the outcomes: what is lost to not
knowing. A stream has recovered at the request after the exchange from which on 200 requests lose
no more than 5 % to it. Intervals are bootstrapped over streams. Vectors are kept under
.cache/composer.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import SHARED, add_arguments, bootstrap, progress, show
from composer.routing.explore import propensities
from composer.routing.families.clusters import Clusters, ClustersSettings
from composer.routing.learners import BanditLearner, FullLearner, Observed
from composer.routing.online import OnlineSettings
from composer.routing.views import Views
from router_training.data import load
from router_training.embedding import open_embedding

Array = npt.NDArray[Any]

PAGE = 20
LENGTH, RUNS = 4000, 20
QUICK_LENGTH, QUICK_RUNS = 1000, 2
FIRST_SEED = 100
"""Settings were tried on streams of other tables, with seeds from 0."""
WINDOW, RECOVERED = 200, 0.05


@dataclass(frozen=True)
class World:
    """Base quality, outcomes (n, E) and contexts (n, m) of the questions that are drawn from; the
    two experts that exchange."""

    base: Array
    outcome: Array
    context: Array
    pair: tuple[int, int]


def world(table: str, split: str, settings: OnlineSettings) -> World:
    embedding = open_embedding()
    train, dev = (load(SHARED / f"{table}.{part}.csv.gz").outcomes for part in ("train", split))
    views = Views.fit(train.text, ["embedding"])
    family = Clusters.fit(
        views.transform(train.text, embedding.kept.encode), train, ClustersSettings(), 0
    )
    features = views.transform(dev.text, embedding.kept.encode)
    known = dev.known.all(axis=1)
    base = np.clip(family.predict(features), 0, 1)[known]
    vectors = features["embedding"][known]
    rng = np.random.default_rng(settings.seed)
    projection = rng.standard_normal((vectors.shape[1], settings.dim)) / np.sqrt(settings.dim)
    context = np.hstack([np.ones((len(vectors), 1)), vectors @ projection]).astype(np.float32)
    mean = np.nanmean(train.quality, axis=0)
    pair = (int(mean.argmax()), int(mean.argmin()))
    return World(base.astype(np.float32), dev.quality[known], context, pair)


def swapped(rows: Array, pair: tuple[int, int]) -> Array:
    out = rows.copy()
    out[..., list(pair)] = rows[..., [pair[1], pair[0]]]
    return out


def run(kind: str, w: World, settings: OnlineSettings, length: int, seed: int) -> Array:
    """(length,) regret of each request. `kind`: frozen, random, or a router that learns."""
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, len(w.base), length)
    experts = tuple(map(str, range(w.base.shape[1])))
    s, m = settings, w.context.shape[1]
    learner: BanditLearner | FullLearner
    if s.feedback == "full":
        learner = FullLearner.new(experts, m, rate=s.rate, decay=s.decay)
    else:
        learner = BanditLearner.new(experts, m, half_life=s.half_life, noise=s.noise, prior=s.prior)
    regret = np.zeros(length)
    waiting: list[Observed] = []
    for t, question in enumerate(drawn):
        x, base, outcome = w.context[question], w.base[question], w.outcome[question]
        informed = base
        if t >= length // 2:
            outcome, informed = swapped(outcome, w.pair), swapped(base, w.pair)
        if kind == "frozen":
            chosen = int(base.argmax())
        elif kind == "random":
            chosen = int(rng.integers(len(experts)))
        else:
            quality, spread = learner.quality(x, base)
            if spread is not None:
                spread = None if s.exploration == 0 else s.exploration * spread
            chances = propensities(quality, spread, int(quality.argmax()), s.floor)
            chosen = int(rng.choice(len(experts), p=chances / chances.sum()))
            seen = outcome
            if s.feedback == "bandit":
                seen = np.full(len(experts), np.nan, np.float32)
                seen[chosen] = outcome[chosen]
            waiting.append(Observed(x, base, np.asarray(seen, np.float32)))
            if len(waiting) == PAGE:
                learner, waiting = learner.learned(waiting), []
        regret[t] = float(outcome[int(informed.argmax())]) - float(outcome[chosen])
    return regret


def recovery(after: Array) -> int:
    """Requests after the exchange, (n,) regrets, until `WINDOW` of them lose at most `RECOVERED`;
    n where that never comes."""
    sums = np.convolve(after, np.ones(min(WINDOW, len(after))), "valid")
    good = np.flatnonzero(sums <= RECOVERED * min(WINDOW, len(after)))
    return int(good[0]) if len(good) else len(after)


def described(kind: str, regret: Array) -> dict[str, Any]:
    """One row of (runs, length) regrets."""
    length = regret.shape[1]
    half, last = length // 2, length - length // 4
    total = regret.sum(axis=1)
    back = np.array([recovery(one[half:]) for one in regret])
    low, high = bootstrap(total)
    soon, late = bootstrap(back, statistic=lambda some: float(np.median(some)))
    return {
        "router": kind,
        "before": float(regret[:, :half].sum(axis=1).mean()),
        "after": float(regret[:, half:].sum(axis=1).mean()),
        "whole": float(total.mean()),
        "low": low,
        "high": high,
        "first 500 after, %": 100 * float(regret[:, half : half + 500].mean()),
        "last quarter, %": 100 * float(regret[:, last:].mean()),
        "recovered after": float(np.median(back)),
        "soonest": soon,
        "latest": late,
    }


DEFAULT = OnlineSettings()
KINDS: dict[str, OnlineSettings] = {
    "frozen": DEFAULT,
    "online, full": OnlineSettings(feedback="full"),
    "online, bandit": DEFAULT,
    "bandit, never exploring": OnlineSettings(exploration=0, floor=0),
    "bandit, Thompson, floor 2 %": OnlineSettings(exploration=1, floor=0.02),
    "random": DEFAULT,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--table", default="mix10")
    parser.add_argument("--split", default="dev", help="whose questions come as streams")
    add_arguments(parser)
    args = parser.parse_args()
    length, runs = (QUICK_LENGTH, QUICK_RUNS) if args.quick else (LENGTH, RUNS)
    w = world(args.table, args.split, DEFAULT)
    rows = []
    with progress("streams", len(KINDS) * runs) as step:
        for kind, settings in KINDS.items():
            found = []
            for seed in range(FIRST_SEED, FIRST_SEED + runs):
                found.append(run(kind, w, settings, length, seed))
                step()
            rows.append(described(kind, np.array(found)))
    show(rows, args, title=f"{args.table}.{args.split}: {length} requests, {runs} runs")


if __name__ == "__main__":
    main()
