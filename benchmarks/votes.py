"""Votes of recorded models: accuracy against calls spent, served through the replay engine.

    python benchmarks/votes.py [--only TABLE/POOL …] [--split dev] [--family kernel]

For each pool a router is trained on the train file; heads, bounds and all settings come from its
cross-fitted scores there; the judged split (TABLE.SPLIT.csv.gz) is looked at once. Every policy
reported is served: its answers, calls and probabilities are asserted to be those of the arrays that
the curves are made of. Prints the Markdown of benchmarks/results/votes.md. Some eight minutes of
one core (kernel on mmlu_pro twice).
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import SHARED, progress
from benchmarks.votes_served import FIRST, OPTIONS, REPORTED, Judged, Prepared, same, serve
from composer.errors import ComposerError
from composer.routing.families import FAMILIES
from composer.strategies.extract import make_extractor
from composer.strategies.voting.counting import winner
from composer.strategies.voting.learnt import HeadFile
from composer.types import FloatArray
from router_training.data import Dataset
from router_training.data import load as load_data
from router_training.embedding import Embedding, open_embedding
from router_training.intervals import paired
from router_training.pools import BESIDE, read_pools
from router_training.train import Workshop
from router_training.votes import (
    MOST,
    Heard,
    Told,
    calls_at,
    crossfitted,
    expected_gain,
    head_file,
    numbered,
    tell,
)

Float64 = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

POOLS = {
    "zeroeval/small": "literal",
    "zeroeval/without_o1_mini": "literal",
    "mmlu_pro/small": "choice",
    "mmlu_pro/all": "choice",
}
"""And how their answers are compared."""

STOPS = (2.5, REPORTED, 3.5)


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
    command = " ".join(["python benchmarks/votes.py", *sys.argv[1:]])
    print(f"# Votes at real accuracies\n\n    {command}\n")
    print(f"Measured {date.today()}: {' '.join(INTRODUCTION.format(**vars(args)).split())}\n")
    print("\n".join(told), end="")


INTRODUCTION = """
routers ({family}), heads and bounds from the shared train files by cross-fitting, judged once on
the {split} files; 95 % bootstrap intervals over questions in brackets. Calls go out best first by
the router's calibrated expected quality, five at most. "Score-weighted" weighs an answer by that
quality, "log-odds" by its log-odds with ten options, "head" is the trained head. "Stops" ask two at
once and then one at a time. All policies were served through the pipeline over replayed models, and
each answer was the one that the curves' arrays give.
"""


def one(args: argparse.Namespace, embedding: Embedding, name: str) -> str:
    table, pool = name.split("/")
    experts = read_pools(args.data / BESIDE)[table][pool]
    own = prepared(args, embedding, name, experts)
    judged_file = args.data / f"{table}.{args.split}.csv.gz"
    judged = load_data(judged_file, experts=experts)
    extract = make_extractor(POOLS[name], None)
    train = Heard.of(_numbers(own.data, extract), own.quality, own.data.outcomes)
    file = head_file(train, experts=experts, extractor=POOLS[name], seed=args.seed)
    served, quality = asyncio.run(
        serve(embedding, name, POOLS[name], own, file, judged_file, judged)
    )
    heard = Heard.of(_numbers(judged, extract), quality, judged.outcomes)
    order = np.argsort(-quality, axis=1, kind="stable")[:, :MOST]
    top = np.take_along_axis(quality, order, axis=1)
    curves = {
        "majority": [counted(heard, np.ones_like(top), k) for k in range(1, MOST + 1)],
        "score-weighted": [counted(heard, top, k) for k in range(1, MOST + 1)],
        "log-odds": [counted(heard, _log_odds(top), k) for k in range(1, MOST + 1)],
    }
    told = tell(file.head, heard)
    curves["head"] = list(told.score.T)
    gain = expected_gain(file.head, told)
    stops = {
        calls: stopped(told, calls_at(told, gain, file.bound_for(FIRST, calls), FIRST))
        for calls in STOPS
    }
    best = int(np.nanmean(own.data.outcomes.quality, axis=0, dtype=np.float64).argmax())
    single = np.asarray(judged.outcomes.quality[:, best], np.float64)
    ways = {
        "best single expert": Judged(single, np.ones(len(single))),
        "routed single": Judged(curves["majority"][0], np.ones(len(single))),
    }
    for key, label in (
        ("majority", "majority of 5"),
        ("score-weighted", "score-weighted vote of 5"),
        ("log-odds", "log-odds vote of 5"),
        ("head", "head, 5 asked"),
    ):
        ways[label] = Judged(curves[key][-1], np.full(len(single), float(MOST)))
    ways["log-odds, stops when nothing can change"] = served["log_odds_waves"]
    ways[f"head, stops at {REPORTED:g} calls on average"] = stops[REPORTED]
    same(served["single"], ways["routed single"], name)
    same(served["majority"], ways["majority of 5"], name, calls=False)
    same(served["log_odds_waves"], ways["log-odds vote of 5"], name, calls=False)
    same(served["head"], ways["head, 5 asked"], name, calls=False)
    same(served["head_stops"], stops[REPORTED], name)
    return _section(name, own, train, heard, file, curves, stops, ways, args.seed)


def prepared(
    args: argparse.Namespace, embedding: Embedding, name: str, experts: Sequence[str]
) -> Prepared:
    """A router trained on the table, with what its like says of it."""
    table, _ = name.split("/")
    data = load_data(args.data / f"{table}.train.csv.gz", experts=experts)
    with progress(f"{name}: {args.family}", 1) as step:
        encode = embedding.kept.encode
        workshop = Workshop(data.outcomes, [args.family], encode, seed=args.seed)
        data = Dataset(workshop.outcomes, data.answers, data.ids, data.contaminated, data.notes)
        chosen = workshop.choose(args.family)
        model = workshop.model(chosen, embedding.stamp, source=f"{table}.train.csv.gz")
        step()
    return Prepared(model, chosen.quality, data)


def counted(heard: Heard, weights: npt.NDArray[np.floating], k: int) -> Float64:
    """(n,) scores of the answers that the k best give by these weights (n, K)."""
    out = np.empty(len(heard))
    for i, (answers, own) in enumerate(zip(heard.answers[:, :k].tolist(), weights, strict=True)):
        keys = {rank: None if a < 0 else str(a) for rank, a in enumerate(answers)}
        out[i] = heard.score[i, winner(own.astype(float).tolist(), keys)]
    return out


def stopped(told: Told, calls: Ints) -> Judged:
    return Judged(told.score[np.arange(len(calls)), calls - 1], calls.astype(np.float64))


def _numbers(data: Dataset, extract: Any) -> Ints:
    assert data.answers is not None
    return numbered(data.answers, extract)


def _log_odds(quality: FloatArray) -> Float64:
    """As `counting.log_odds`, of (n, K)."""
    cut = np.clip(quality.astype(np.float64), 0.001, 0.999)
    return np.asarray(np.maximum(np.log(cut * (OPTIONS - 1) / (1 - cut)), 0.01))


def _section(
    name: str,
    own: Prepared,
    train: Heard,
    heard: Heard,
    file: HeadFile,
    curves: Mapping[str, Sequence[Float64]],
    stops: Mapping[float, Judged],
    ways: Mapping[str, Judged],
    seed: int,
) -> str:
    single = ways["best single expert"].score
    lines = [
        f"## {name}: {len(own.model.experts)} experts\n",
        f"{len(train)} questions fitted on, {len(heard)} judged.\n",
        "| policy | calls | accuracy, % (95 %) | over best single | over routed single |",
        "|---|---|---|---|---|",
    ]
    for label, way in ways.items():
        against = [
            _points(way.score - base, heard.group, seed)
            for base in (single, ways["routed single"].score)
        ]
        lines.append(
            f"| {label} | {way.calls.mean():.2f} | {_percent(way.score, heard.group, seed)} | "
            f"{' | '.join(against)} |"
        )
    calls = [str(k) for k in range(1, MOST + 1)]
    lines += [
        "\nBy the number of calls, the same for all questions, %:\n",
        f"| | {' | '.join(calls)} |",
        "|---|" + "---|" * MOST,
    ]
    for label, by_calls in curves.items():
        lines.append(f"| {label} | {' | '.join(f'{100 * s.mean():.2f}' for s in by_calls)} |")
    cv = file.metrics["by_calls"]
    lines.append(f"| head, cross-fitted on train | {' | '.join(f'{100 * s:.2f}' for s in cv)} |")
    lines += [
        f"\nThe head with stops, first {FIRST} at once, bounds chosen on train:\n",
        "| calls wanted | calls | accuracy, % | over head, 5 asked | cross-fitted on train |",
        "|---|---|---|---|---|",
    ]
    told, gain = crossfitted(train, seed)
    for wanted, way in stops.items():
        seen = stopped(told, calls_at(told, gain, file.bound_for(FIRST, wanted), FIRST))
        lines.append(
            f"| {wanted:g} | {way.calls.mean():.2f} | {100 * way.score.mean():.2f} | "
            f"{_points(way.score - curves['head'][-1], heard.group, seed)} | "
            f"{100 * seen.score.mean():.2f} at {seen.calls.mean():.2f} |"
        )
    return "\n".join(lines) + "\n"


def _percent(values: Float64, group: Ints, seed: int) -> str:
    around = paired(values, group, seed=seed)
    assert around is not None
    return f"{100 * around.mean:.2f} ({100 * around.low:.1f} to {100 * around.high:.1f})"


def _points(values: Float64, group: Ints, seed: int) -> str:
    around = paired(values, group, seed=seed)
    assert around is not None
    return f"{100 * around.mean:+.2f} ({100 * around.low:+.1f} to {100 * around.high:+.1f})"


if __name__ == "__main__":
    main()
