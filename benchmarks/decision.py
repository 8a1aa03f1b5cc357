"""What a decision costs: embed, score and choose, by number of experts and length of query.

    python benchmarks/decision.py [--sizes N …] [--lengths N …] [--json FILE] [--quick]

One process on one core (pinned, one thread). Each timed query is a new text of exactly 32, 128 or
256 tokens (special tokens included), sent through the embedder and the router as the service
does: so thread hops and the event loop are in. `embed` and `score` (search, calibration, choice,
and of the router `online` its correction and draw) are the two parts of `total`; milliseconds.
Reading the request and recording the answer are not in. `cpu` is the processor time of the same
decisions, p50: on a core that nobody else uses the two are the same, on a busy one it is what the
code itself takes.

Experts are synthetic, since nobody has 10,000: each is a real intent of clinc150 or banking77
(training rows' embeddings) moved by its own random offset. Its 20 rows are rows of that intent
plus the offset plus noise along the directions in which intents' rows really scatter, normalised.
So experts of one intent are near-duplicates of each other, harder to tell apart than real ones,
and lie in clusters as real ones do. `recall1` asks vectors made the same way that are in no
index: the share for which the router with this index prefers the same expert as with the exact
one; `row_recall1` the same for the nearest single row.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OPENBLAS_NUM_THREADS"] = "1"

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import CONSOLE, ROOT, SHARED, add_arguments, progress, show
from benchmarks.retrieval import MAX_EXAMPLES, OUT_OF_SCOPE, read
from composer.embedder import TextEmbedder, load_embedder
from composer.routing.aims import Aim
from composer.routing.base import Query, Router
from composer.routing.choose import choose
from composer.routing.explore import explored
from composer.routing.index import IvfIndex
from composer.routing.metric import apply_metric
from composer.routing.neighbours import NeighboursRouter, NeighboursSettings, Texts
from composer.routing.online import OnlineRouter, OnlineSettings
from composer.types import Component, FloatArray, Policy
from router_training.vectors import KeptVectors

ROWS = 20
LENGTHS = (32, 128, 256)
OFFSET = 0.35
"""Length of an expert's offset, beside unit rows: near-duplicates stay closer than intents."""
NOISE = 0.5
"""Of the real scatter within an intent, added to each row."""
HELD_QUERIES = 1000
ONLINE_UP_TO = 1000
"""Experts. The router `online` keeps some 9 kB of each in memory."""
WARM = 5
"""Queries before the timed ones: the first find cold caches."""


class Maker:
    """Draws experts' rows and queries near them from real intents."""

    def __init__(self, rows: FloatArray, intent: Any, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.rows = rows
        self.members = [np.flatnonzero(intent == i) for i in np.unique(intent)]
        centred = np.concatenate([rows[own] - rows[own].mean(axis=0) for own in self.members])
        values, vectors = np.linalg.eigh(centred.T @ centred / len(centred))
        self.root = (vectors * np.sqrt(np.maximum(values, 0))).astype(np.float32)  # (d, d)

    def experts(self, n: int) -> tuple[FloatArray, FloatArray]:
        """(n · ROWS, d) rows, expert by expert, and (HELD_QUERIES, d) queries in no index."""
        d = self.rows.shape[1]
        intent = self.rng.integers(len(self.members), size=n)
        offset = self.rng.standard_normal((n, d)).astype(np.float32) * (OFFSET / np.sqrt(d))
        rows = np.concatenate([self._near(intent[e], offset[e], ROWS) for e in range(n)])
        asked = self.rng.integers(n, size=HELD_QUERIES)
        queries = np.concatenate([self._near(intent[e], offset[e], 1) for e in asked])
        return rows, queries

    def _near(self, intent: int, offset: FloatArray, n: int) -> FloatArray:
        members = self.members[intent]
        real = self.rows[self.rng.choice(members, n, replace=n > len(members))]
        noise = self.rng.standard_normal(real.shape).astype(np.float32) @ self.root.T
        made = real + offset + NOISE * noise
        return np.asarray(made / np.linalg.norm(made, axis=1, keepdims=True), np.float32)


def texts_of(n_experts: int) -> Texts:
    n = n_experts * ROWS
    return Texts(
        tuple(f"row {i}" for i in range(n)),
        ("examples",) * n,
        np.arange(0, n + 1, ROWS, dtype=np.int64),
    )


def queries_of(
    length: int, n: int, words: list[str], embedder: TextEmbedder, seed: int
) -> list[str]:
    """n different texts of exactly `length` tokens, from shuffled words of real queries."""
    rng = np.random.default_rng((length, seed))
    made = []
    while len(made) < n:
        text = " ".join(rng.choice(words, length))
        while embedder.count_tokens([text])[0] > length:
            text = text.rpartition(" ")[0]
        missing = length - embedder.count_tokens([text])[0]
        made.append(" ".join([text, *["a"] * missing]))
    return made


async def time_decisions(
    router: Router, embedder: TextEmbedder, texts: list[str], policy: Policy
) -> FloatArray:
    """(n, 2, 2) milliseconds of embedding and of the rest, each as passed and of the processor."""
    eligible = np.ones(len(router.experts), np.bool_)
    aim = Aim(0.0, np.zeros(len(router.experts), np.float32))
    found = []
    for number, text in enumerate(texts):
        begun = perf_counter(), process_time()
        await embedder.embed(text)
        between = perf_counter(), process_time()
        scores = await router.score(Query(text), eligible)  # the embedding is in the cache now
        plan = choose(scores, aim, policy)
        explored(plan, scores, aim, policy, number / len(texts))
        ended = perf_counter(), process_time()
        found.append((np.subtract(between, begun), np.subtract(ended, between)))
    return np.asarray(np.array(found) * 1e3, np.float32)


def recall(
    router: NeighboursRouter, exact: NeighboursRouter, queries: FloatArray
) -> tuple[float, float]:
    """Shares of queries whose best expert, and whose nearest row, are those of the exact index."""
    best, truth = router.similarities(queries).argmax(1), exact.similarities(queries)
    # Equal similarity is as good: rows may be duplicates.
    top = truth[np.arange(len(queries)), best] >= truth.max(axis=1) - 1e-6
    mapped = apply_metric(queries, router.metric)
    found, real = router.index.search(mapped, 1)[0], exact.index.search(mapped, 1)[0]
    return float(top.mean()), float((found >= real - 1e-6).mean())


async def measure(
    sizes: list[int],
    lengths: list[int],
    repeats: int,
    maker: Maker,
    words: list[str],
    model: TextEmbedder,
) -> list[dict[str, Any]]:
    table: list[dict[str, Any]] = []
    for n in sizes:
        ids = tuple(f"expert-{i}" for i in range(n))
        policy = Policy("auto", Component("neighbours", None), Component("single", None), ids)
        rows, held = maker.experts(n)
        exact: NeighboursRouter | None = None
        for settings in (NeighboursSettings(index="flat"), NeighboursSettings()):
            with CONSOLE.status(f"{n} experts: building"):
                begun = perf_counter()
                router = NeighboursRouter.of_rows(ids, texts_of(n), rows, settings, model)
                built = perf_counter() - begun
                exact = exact or router
                if router is not exact and router.index.kind == exact.index.kind:
                    continue  # `auto` chose the exact index, measured already
                of_expert, of_row = recall(router, exact, held)
            found = {
                "build_s": round(built, 1),
                "recall1": of_expert,
                "row_recall1": of_row,
                "nprobe": router.index.nprobe if isinstance(router.index, IvfIndex) else None,
                "index_mb": round(rows.nbytes / 1e6, 1),
                "queries": repeats,
            }
            timed: list[Router] = [router]
            if n <= ONLINE_UP_TO:
                timed.append(OnlineRouter(router, OnlineSettings(), model))
            with progress(f"{n} experts, {router.index.kind}", len(lengths) * len(timed)) as step:
                for one in timed:
                    what = {"experts": n, "router": one.name, "index": router.index.kind}
                    for length in lengths:
                        texts = queries_of(length, repeats + WARM, words, model, len(table))
                        times = described((await time_decisions(one, model, texts, policy))[WARM:])
                        table.append(what | {"tokens": length} | times | found)
                        step()
    return table


def described(found: FloatArray) -> dict[str, float]:
    """Percentiles of both parts and of their sum, and the median of the processor's time."""
    times = {}
    for part, of_part in (
        ("total", found.sum(axis=1)),
        ("embed", found[:, 0]),
        ("score", found[:, 1]),
    ):
        passed, cpu = of_part.T
        for q in (50, 95):
            times[f"{part}_p{q}_ms"] = round(float(np.percentile(passed, q)), 2)
        times[f"{part}_cpu_ms"] = round(float(np.median(cpu)), 2)
    return times


def real_rows(each: int, *, quick: bool) -> tuple[list[str], list[str]]:
    """Texts and intents of both shared sets, at most `each` an intent; quick: of 20 intents."""
    texts: dict[str, list[str]] = {}
    for name in ("clinc150", "banking77"):
        queries = read(SHARED / f"{name}.train.csv.gz")
        for text, intent in zip(queries.text, queries.intent, strict=True):
            own = texts.setdefault(f"{name}/{intent}", [])
            if intent != OUT_OF_SCOPE and len(own) < each:
                own.append(text)
    intents = [intent for intent, own in texts.items() if own]
    if quick:
        intents = intents[:: len(intents) // 20][:20]
    return [t for i in intents for t in texts[i]], [i for i in intents for _ in texts[i]]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", help="numbers of experts")
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS), help="tokens")
    add_arguments(parser)
    args = parser.parse_args()
    if not SHARED.is_dir():
        parser.error(f"{SHARED} is not there: the experts are made from its queries")
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    embedder = load_embedder("all-MiniLM-L6-v2", cache_dir=ROOT / ".cache" / "composer")
    texts, intents = real_rows(20 if args.quick else MAX_EXAMPLES, quick=args.quick)
    kept = KeptVectors(embedder, ROOT / ".cache" / "composer" / "vectors")
    maker = Maker(kept.encode(texts), np.array(intents))
    words = sorted({word for text in texts for word in text.split() if word.isalpha()})
    sizes = args.sizes or ([10, 100, 1000] if args.quick else [10, 100, 1000, 10_000])
    repeats = 15 if args.quick else 100
    table = asyncio.run(measure(sizes, args.lengths, repeats, maker, words, embedder))
    title = "A decision, one core" + (" (quick: fewer queries, no 10,000)" if args.quick else "")
    show(table, args, title=title)


if __name__ == "__main__":
    main()
