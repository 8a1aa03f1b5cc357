"""Retrieval on intent sets: each intent is an expert, its training queries are its examples.

    python benchmarks/retrieval.py [--train FILE --eval FILE] [--json FILE] [--quick]

Files are CSV (gzipped or not) with the columns `query` and `intent`; queries of intent `oos` are
out of scope. Without files: clinc150 and banking77 of ../shared/data, train against dev.

Ours is the service's own router (`composer/routing/neighbours.py`) on at most 100 examples an
intent; out-of-scope rows of the training file are dropped, so it never saw one. The others, on
the same vectors and rows: kNN (the nearest row; PHATGOOSE's retrieval baseline), kNN vote (10
nearest, weighted by similarity), nearest centroid, logistic regression (C chosen of three by
cross-validation on training rows).

top1: in-scope accuracy without rejection. auroc: in scope against out of scope by the score named
in `scope_score`. ece and brier: of the calibrated quality, over all rows, where a router has one.
Intervals: 95 % bootstrap over evaluation rows.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import sys
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import CONSOLE, ROOT, SHARED, add_arguments, bootstrap, progress, show
from composer.embedder import TextEmbedder, load_embedder
from composer.routing.neighbours import NeighboursRouter, NeighboursSettings
from composer.types import Expert, FloatArray

MAX_EXAMPLES = 100
OUT_OF_SCOPE = "oos"
QUICK_ROWS = 15

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Queries:
    text: list[str]
    intent: list[str]


def read(path: Path) -> Queries:
    """Raises SystemExit, naming file and remedy, for a file that is not one of these tables."""
    if not path.exists():
        raise SystemExit(f"{path} does not exist; name other files with --train and --eval")
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file)
        missing = {"query", "intent"} - set(rows.fieldnames or ())
        if missing:
            raise SystemExit(f"{path} has no column {', '.join(sorted(missing))}")
        table = [(row["query"], row["intent"]) for row in rows]
    if not table:
        raise SystemExit(f"{path} has no rows")
    return Queries([text for text, _ in table], [intent for _, intent in table])


@dataclass(frozen=True, slots=True)
class Problem:
    """Vectors of training rows (n, d) and evaluation rows (q, d) with their intents' numbers;
    −1 is out of scope."""

    name: str
    experts: tuple[Expert, ...]
    train: FloatArray
    train_intent: Ints
    evaluate: FloatArray
    intent: Ints

    @property
    def in_scope(self) -> Bools:
        return self.intent >= 0


def prepare(name: str, train: Queries, evaluate: Queries, embedder: TextEmbedder) -> Problem:
    names = sorted(set(train.intent) - {OUT_OF_SCOPE})
    number = {intent: i for i, intent in enumerate(names)}
    if unknown := sorted(set(evaluate.intent) - set(names) - {OUT_OF_SCOPE}):
        raise SystemExit(f"{name}: the evaluation file has intents never trained: {unknown[:5]}")
    examples: list[list[str]] = [[] for _ in names]
    for text, intent in zip(train.text, train.intent, strict=True):
        if intent != OUT_OF_SCOPE and len(examples[number[intent]]) < MAX_EXAMPLES:
            examples[number[intent]].append(text)
    rows = [text for own in examples for text in own]
    return Problem(
        name=name,
        experts=tuple(
            Expert(id=intent, server="none", examples=tuple(own))
            for intent, own in zip(names, examples, strict=True)
        ),
        train=embed(rows, embedder, f"{name}: examples"),
        train_intent=np.repeat(np.arange(len(names)), [len(own) for own in examples]),
        evaluate=embed(evaluate.text, embedder, f"{name}: queries"),
        intent=np.array([number.get(intent, -1) for intent in evaluate.intent]),
    )


def embed(texts: list[str], embedder: TextEmbedder, label: str) -> FloatArray:
    step = 256
    parts = []
    with progress(label, -(-len(texts) // step)) as advance:
        for first in range(0, len(texts), step):
            parts.append(embedder.encode(texts[first : first + step]))
            advance()
    return np.concatenate(parts)


# --- the sides: (q, E) scores, and a scope score (q,) high where a query is in scope ---------


def ours(problem: Problem, settings: NeighboursSettings, embedder: TextEmbedder) -> list[Any]:
    began = perf_counter()
    router = NeighboursRouter.build(problem.experts, settings, embedder)
    built = perf_counter() - began
    similarity = router.similarities(problem.evaluate)
    quality = router.calibration.quality(similarity)[0]
    return [similarity, similarity.max(axis=1), quality, built]


def nearest_row(problem: Problem) -> list[Any]:
    products = problem.evaluate @ problem.train.T
    scores = np.full((len(products), len(problem.experts)), -1.0, np.float32)
    for expert in range(len(problem.experts)):
        scores[:, expert] = products[:, problem.train_intent == expert].max(axis=1)
    return [scores, scores.max(axis=1), None, None]


def vote(problem: Problem, k: int = 10) -> list[Any]:
    products = problem.evaluate @ problem.train.T
    k = min(k, products.shape[1])
    nearest = np.argpartition(-products, k - 1, axis=1)[:, :k]
    similarity = np.take_along_axis(products, nearest, axis=1)
    scores = np.zeros((len(products), len(problem.experts)))
    np.add.at(
        scores, (np.arange(len(products))[:, None], problem.train_intent[nearest]), similarity
    )
    return [scores, scores.max(axis=1), None, None]


def centroid(problem: Problem) -> list[Any]:
    means = np.zeros((len(problem.experts), problem.train.shape[1]))
    np.add.at(means, problem.train_intent, problem.train)
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    scores = problem.evaluate @ means.T
    return [scores, scores.max(axis=1), None, None]


def logistic(problem: Problem, quick: bool) -> list[Any]:
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_score

    def model(c: float) -> LogisticRegression:
        return LogisticRegression(C=c, max_iter=200)

    best = 10.0
    if not quick:
        few = np.random.default_rng(0).permutation(len(problem.train))[:4000]
        candidates = (3.0, 10.0, 30.0)
        x, y = problem.train[few], problem.train_intent[few]
        best = max(candidates, key=lambda c: cross_val_score(model(c), x, y, cv=3).mean())
    began = perf_counter()
    fitted = model(best).fit(problem.train, problem.train_intent)
    built = perf_counter() - began
    probability = fitted.predict_proba(problem.evaluate)
    return [probability, probability.max(axis=1), probability, built]


def row_of(problem: Problem, router: str, scope_score: str, found: list[Any]) -> dict[str, Any]:
    from sklearn.metrics import roc_auc_score

    scores, scope, quality, built = found
    within = problem.in_scope
    right = scores.argmax(axis=1) == problem.intent
    low, high = bootstrap(right[within])
    row: dict[str, Any] = {
        "set": problem.name,
        "router": router,
        "intents": len(problem.experts),
        "examples": len(problem.train),
        "queries": len(within),
        "top1": float(right[within].mean()),
        "top1_low": low,
        "top1_high": high,
        "auroc": None,
        "auroc_low": None,
        "auroc_high": None,
        "scope_score": scope_score,
    }
    if within.any() and not within.all():

        def auroc(pairs: npt.NDArray[Any]) -> float:
            both = 0 < pairs[:, 0].sum() < len(pairs)
            return float(roc_auc_score(pairs[:, 0], pairs[:, 1])) if both else float("nan")

        pairs = np.stack([within.astype(float), scope], axis=1)
        row["auroc"] = auroc(pairs)
        row["auroc_low"], row["auroc_high"] = bootstrap(pairs, statistic=auroc, draws=300)
    row["ece"] = row["brier"] = None
    if quality is not None:
        best = quality.max(axis=1)
        row["ece"] = expected_calibration_error(best, right)
        row["brier"] = float(((best - right) ** 2).mean())
    row["build_s"] = None if built is None else round(built, 2)
    return row


def expected_calibration_error(p: npt.NDArray[Any], right: Bools, bins: int = 15) -> float:
    """Over bins of equal counts: mean of |mean probability − share right|, weighted by size."""
    parts = np.array_split(np.argsort(p), bins)
    return float(sum(len(b) * abs(p[b].mean() - right[b].mean()) for b in parts if len(b)) / len(p))


def measure(problem: Problem, embedder: TextEmbedder, quick: bool) -> list[dict[str, Any]]:
    default = NeighboursSettings()
    plain = "best similarity"
    found = ours(problem, default, embedder)
    by_quality = [found[0], found[2].max(axis=1), found[2], found[3]]
    sides = [
        row_of(problem, "ours: blend, discriminant (default)", plain, found),
        row_of(problem, "ours: the same, quality", "quality", by_quality),
    ]
    for aggregate in ("blend", "top_m", "centroid"):
        metric = "cosine" if aggregate != "centroid" else "discriminant"
        settings = NeighboursSettings(aggregate=aggregate, metric=metric)
        name = f"ours: {aggregate}, {metric}"
        sides.append(row_of(problem, name, plain, ours(problem, settings, embedder)))
    sides += [
        row_of(problem, "kNN, nearest row", plain, nearest_row(problem)),
        row_of(problem, "kNN, vote of 10", "vote", vote(problem)),
        row_of(problem, "nearest centroid", plain, centroid(problem)),
        row_of(problem, "logistic regression", "probability", logistic(problem, quick)),
    ]
    return sides


def fewer(queries: Queries, each: int) -> Queries:
    """The first `each` rows of every intent."""
    seen: dict[str, int] = {}
    kept = []
    for i, intent in enumerate(queries.intent):
        seen[intent] = seen.get(intent, 0) + 1
        if seen[intent] <= each:
            kept.append(i)
    return Queries([queries.text[i] for i in kept], [queries.intent[i] for i in kept])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--train", type=Path, metavar="FILE", help="CSV: query, intent")
    parser.add_argument("--eval", type=Path, metavar="FILE", help="CSV: query, intent")
    add_arguments(parser)
    args = parser.parse_args()
    if (args.train is None) != (args.eval is None):
        parser.error("give --train and --eval together, or neither")
    files = [(args.train, args.eval)]
    if args.train is None:
        if not SHARED.is_dir():
            parser.error(f"{SHARED} is not there; give --train and --eval")
        files = [
            (SHARED / f"{name}.train.csv.gz", SHARED / f"{name}.dev.csv.gz")
            for name in ("clinc150", "banking77")
        ]
    embedder = load_embedder("all-MiniLM-L6-v2", cache_dir=ROOT / ".cache" / "composer")
    table = []
    for train_file, eval_file in files:
        train, evaluate = read(train_file), read(eval_file)
        if args.quick:
            train, evaluate = fewer(train, QUICK_ROWS), fewer(evaluate, 5)
        name = train_file.name.partition(".")[0]
        problem = prepare(name, train, evaluate, embedder)
        with CONSOLE.status(f"{name}: fitting"):
            table += measure(problem, embedder, args.quick)
    title = "Intent sets as registries" + (" (quick: fewer rows)" if args.quick else "")
    show(table, args, title=title)


if __name__ == "__main__":
    main()
