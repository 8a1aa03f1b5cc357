"""Intents as experts: what routes queries to them, and turns away what is nobody's.

    python benchmarks/intents.py [--only TABLE …] [--router FAMILY …] [--split dev] [--seed N]

Settings are chosen by five-fold cross-validation on train, each method is fitted once on train, and
TABLE.SPLIT.csv.gz is judged once. `ours` is what `router-training train --router best` chose; the
other families that it chose from (with --router of these alone) stand beside it, and simple methods
on the same vectors. Prints the Markdown of benchmarks/results/intents.md. One process,
one thread; COMPOSER_EMBEDDER names the embedder, whose vectors are kept under .cache/composer.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import SHARED
from composer.errors import ComposerError
from composer.routing.families import FAMILIES
from composer.routing.families.labels import Labels
from composer.routing.family import decided
from composer.routing.outcomes import Outcomes
from composer.routing.trained import TrainedQueries
from composer.routing.views import Encode
from composer.types import FloatArray
from router_training.crossfit import by_stem, folds_by_stem
from router_training.embedding import Embedding, open_embedding
from router_training.evaluate import TIMED, UNTIMED, timed
from router_training.intents import read_intents
from router_training.intervals import Interval, paired
from router_training.measures import earned
from router_training.overlap import parted
from router_training.rejection import rejectable, scope_card, threshold_of
from router_training.split import parts
from router_training.suited import suited
from router_training.train import Workshop

TABLES = ("banking77", "clinc150")

OFFICIAL = 2 / 11
"""Of clinc150's official test queries that are out of scope: 1,000 of 5,500."""

Owners = npt.NDArray[np.int64]
Says = Callable[[FloatArray], tuple[FloatArray, FloatArray]]
"""Vectors (n, d) → scores (n, E), and confidence (n,) that the best of them is right."""


def owners(outcomes: Outcomes) -> Owners:
    """(n,) the intent's number, E for nobody's."""
    best = outcomes.quality.argmax(axis=1)
    return np.where(outcomes.in_scope, best, len(outcomes.experts)).astype(np.int64)


# --- simple methods on the vectors: (vectors, owner, E, setting) → Says -----------------------


def knn(rows: FloatArray, owner: Owners, experts: int, k: int) -> Says:
    """Votes weighed by exp(cosine / 0.05), confidence by the nearest; of those in scope alone, as
    published."""
    some = owner < experts

    def says(vectors: FloatArray) -> tuple[FloatArray, FloatArray]:
        return _votes(vectors, rows[some], owner[some], experts, k)

    return says


def knn_of_all(rows: FloatArray, owner: Owners, experts: int, k: int) -> Says:
    """The same, what is nobody's a class of its own: confidence is the share of the votes."""

    def says(vectors: FloatArray) -> tuple[FloatArray, FloatArray]:
        votes, _ = _votes(vectors, rows, owner, experts + 1, k)
        scores = votes[:, :experts]
        return scores, scores.max(axis=1) / votes.sum(axis=1)

    return says


def _votes(
    vectors: FloatArray, rows: FloatArray, owner: Owners, classes: int, k: int
) -> tuple[FloatArray, FloatArray]:
    """(n, classes), and the cosine of the nearest (n,)."""
    scores = np.zeros((len(vectors), classes), np.float32)
    nearest = np.empty(len(vectors), np.float32)
    for i in range(0, len(vectors), 1024):
        cosine = vectors[i : i + 1024] @ rows.T
        place = np.argpartition(-cosine, k - 1, axis=1)[:, :k]
        near = np.take_along_axis(cosine, place, axis=1)
        weight = np.exp((near - near.max(axis=1, keepdims=True)) / 0.05)
        np.add.at(scores, (np.arange(i, i + len(near))[:, None], owner[place]), weight)
        nearest[i : i + 1024] = near.max(axis=1)
    return scores, nearest


def centroid(rows: FloatArray, owner: Owners, experts: int, _: int) -> Says:
    """Of those in scope alone; confidence is the cosine."""
    means = _means(rows, owner, experts)

    def says(vectors: FloatArray) -> tuple[FloatArray, FloatArray]:
        scores = vectors @ means.T
        return scores, scores.max(axis=1)

    return says


def centroid_of_all(rows: FloatArray, owner: Owners, experts: int, _: int) -> Says:
    """The same; confidence is by how much the cosine is above that of nobody's centroid, from 0
    to 1."""
    means = _means(rows, owner, experts + 1)

    def says(vectors: FloatArray) -> tuple[FloatArray, FloatArray]:
        cosine = vectors @ means.T
        scores = cosine[:, :experts]
        return scores, (1 + scores.max(axis=1) - cosine[:, experts]) / 2

    return says


def _means(rows: FloatArray, owner: Owners, classes: int) -> FloatArray:
    means = np.stack([rows[owner == e].mean(axis=0) for e in range(classes)])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    return means


def logistic(rows: FloatArray, owner: Owners, experts: int, sharpness: float) -> Says:
    """Multinomial; nobody's is a class like any other, where there are such rows."""
    labels = Labels.fit({"embedding": rows}, [f"{o:05}" for o in owner], sharpness)
    columns = [labels.names.index(f"{e:05}") for e in range(experts)]

    def says(vectors: FloatArray) -> tuple[FloatArray, FloatArray]:
        scores = labels.posterior({"embedding": vectors})[:, columns]
        return scores, scores.max(axis=1)

    return says


SIMPLE: dict[str, tuple[Callable[..., Says], Sequence[Any]]] = {
    "kNN": (knn, (20, 10, 40)),
    "kNN, nobody's a class": (knn_of_all, (20, 10, 40)),
    "centroid": (centroid, (0,)),
    "centroid, nobody's a class": (centroid_of_all, (0,)),
    "logistic": (logistic, (50.0,)),
}
"""The fit, and the settings that cross-validation chooses from. Logistic regression has one, which
it chose before on either table: a fit takes as long as all of kNN."""

OF_ALL = ("kNN, nobody's a class", "centroid, nobody's a class")
"""These differ from the published ones only where the table has queries that are nobody's."""


# --- one table ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """`right` (m,) of the judged questions in scope; `cv` in-scope accuracy on train."""

    name: str
    cv: float
    right: npt.NDArray[np.float64]
    scope: dict[str, Any] | None
    decision_ms: float
    without_embedding_ms: float


def simple(
    name: str, train: Outcomes, dev: Outcomes, fold: Owners, embedding: Embedding, seed: int
) -> Row:
    make, tried = SIMPLE[name]
    rows, count = embedding.kept.encode(train.text), len(train.experts)
    owner, inside = owners(train), train.in_scope
    apart = []
    for setting in tried:
        scores = np.empty((len(train), count), np.float32)
        confidence = np.empty(len(train), np.float32)
        for seen, held in parts(fold):
            scores[held], confidence[held] = make(rows[seen], owner[seen], count, setting)(
                rows[held]
            )
        right = scores.argmax(axis=1) == owner
        apart.append((float(right[inside].mean()), right, confidence))
    best = int(np.argmax([cv for cv, _, _ in apart]))
    cv, right, confidence = apart[best]
    says = make(rows, owner, count, tried[best])
    threshold = threshold_of(confidence, right, inside) if rejectable(train) else None
    scores, sure = says(embedding.kept.encode(dev.text))
    latency = timed_simple(says, dev.text, embedding.encode_anew)
    chosen = scores.argmax(axis=1)
    setting = "" if len(tried) == 1 else f" ({tried[best]:g})"
    return row(name + setting, cv, dev, chosen, sure, threshold, latency, seed)


def row(
    name: str,
    cv: float,
    dev: Outcomes,
    chosen: npt.NDArray[np.integer],
    confidence: npt.NDArray[np.floating],
    threshold: float | None,
    latency: tuple[float, float],
    seed: int,
) -> Row:
    right = earned(dev.quality, chosen)[dev.in_scope]
    return Row(name, cv, right, scope_card(dev, confidence, chosen, threshold, seed=seed), *latency)


def timed_simple(says: Says, texts: Sequence[str], encode: Encode) -> tuple[float, float]:
    """As `evaluate.timed` times artefacts: median milliseconds with the embedding and without."""
    wholes, rests = [], []
    number = min(len(texts), TIMED + UNTIMED)
    for i in np.linspace(0, len(texts) - 1, number).astype(int):
        begun = perf_counter()
        vector = encode([texts[i]])
        embedded = perf_counter()
        says(vector)[0].argmax()
        done = perf_counter()
        wholes.append(done - begun)
        rests.append(done - embedded)
    whole, rest = (float(1000 * np.median(times[UNTIMED:])) for times in (wholes, rests))
    return whole, rest


def judge(
    table: str,
    train: Outcomes,
    dev: Outcomes,
    embedding: Embedding,
    only: Sequence[str],
    seed: int,
) -> tuple[list[Row], str]:
    """All methods, ours first, and why it is the one."""
    families, _ = suited(train, only or list(FAMILIES))
    encode = embedding.kept.encode
    workshop = Workshop(train, families, encode, seed=seed, progress=said(table))
    best, choice = workshop.best(families)
    found = []
    for family in (best.family, *(f for f in families if f != best.family)):
        chosen = workshop.choose(family)
        model = workshop.model(chosen, embedding.stamp)
        quality = model.score(dev.text, encode).quality
        at = decided(quality, dev.known)
        own = decided(chosen.quality, workshop.outcomes.known)
        cv = earned(workshop.outcomes.quality, own)[workshop.outcomes.in_scope].mean()
        latency = timed(model, dev.text, embedding.encode_anew)
        times = latency.decision_ms, latency.without_embedding_ms
        threshold = model.manifest.metrics["threshold"]
        name = f"**ours: {family}**" if family == best.family else family
        found.append(row(name, float(cv), dev, at, earned(quality, at), threshold, times, seed))
    grouped = by_stem(train)
    fold = folds_by_stem(grouped, seed)
    wanted = [name for name in SIMPLE if name not in OF_ALL or rejectable(train)]
    found += [simple(name, grouped, dev, fold, embedding, seed) for name in wanted]
    return found, str(choice["why"])


def said(table: str) -> Callable[[str, int, int], None]:
    def progress(label: str, done: int, total: int) -> None:
        print(f"{table}: {label} {done}/{total}", file=sys.stderr)

    return progress


# --- Markdown -----------------------------------------------------------------------------


def around(value: float, low: float, high: float) -> str:
    return f"{100 * value:.2f} ({100 * low:.1f} to {100 * high:.1f})"


def markdown(
    table: str, train: Outcomes, dev: Outcomes, rows: Sequence[Row], why: str, embedder: str
) -> str:
    group = dev.group[dev.in_scope]
    rejects = any(r.scope is not None for r in rows)
    heads = ["router", "cross-fitted", "in scope, % (95 %)", "ours is ahead by"]
    if rejects:
        heads += ["AUROC (95 %)", "kept and right", "nobody's found", "overall (95 %)"]
        heads += [f"overall at {100 * OFFICIAL:.0f} % nobody's"]
    heads += ["decision, ms", "without embedding"]
    lines = [heads, ["---"] * len(heads)]
    for r in rows:
        cells = [r.name, f"{100 * r.cv:.2f}", mean(paired(r.right, group))]
        ahead = paired(rows[0].right - r.right, group)
        cells.append("–" if r is rows[0] else mean(ahead))
        if rejects:
            s = r.scope
            assert s is not None  # the judged questions are the same for all
            kept, found = s["in_scope_kept_acc"], s["out_of_scope_found"]
            low, high = s["auroc_ci95"]
            cells.append(f"{s['auroc']:.4f} ({low:.3f} to {high:.3f})")
            cells += [f"{100 * kept:.2f}", f"{100 * found:.1f}"]
            cells.append(around(s["overall_acc"], *s["overall_ci95"]))
            cells.append(f"{100 * ((1 - OFFICIAL) * kept + OFFICIAL * found):.2f}")
        lines.append([*cells, f"{r.decision_ms:.1f}", f"{r.without_embedding_ms:.1f}"])
    outside = int((~dev.in_scope).sum())
    return "\n\n".join(
        [
            f"## {table}: {len(train.experts)} intents, {embedder}",
            f"{len(train)} queries fitted on ({int((~train.in_scope).sum())} nobody's), {len(dev)} "
            f"judged ({outside} nobody's). {_overlap(train, dev)}`--router best` chose {why}.",
            "\n".join(f"| {' | '.join(cells)} |" for cells in lines),
        ]
    )


def _overlap(train: Outcomes, dev: Outcomes) -> str:
    _, [overlap] = parted(dev, [TrainedQueries.of(train.text)], without=False)
    told = overlap.sentence
    return "" if told is None else f"{told[0].upper()}{told[1:]}. "


def mean(interval: Interval | None) -> str:
    assert interval is not None  # every query has its intent
    return around(interval.mean, interval.low, interval.high)


INTRODUCTION = """
fitted on the shared train files, settings by five-fold cross-validation there (in-scope accuracy),
judged once on the {split} files, vectors of {embedder}. In-scope accuracy is without rejection;
"ahead" is the paired difference in points. The confidence of ours is its calibrated quality, kNN's
the nearest cosine, the centroid's the best cosine: neither sees queries that are nobody's.
"Nobody's a class" gives them these, too, as ours and logistic regression have them; confidence is
then the best intent's share of the votes, or by how much its cosine is above that of nobody's
centroid, and logistic's the best intent's probability. Each is rejected below the threshold that
its cross-fitted predictions on train set it, for one request in five being nobody's. "Overall"
counts an intent that is right, or nobody's turned away, in the judged file as it is, and reweighed
to clinc150's official share. Decisions are timed one at a time on one core, medians.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, default=SHARED, help="folder of the shared tables")
    parser.add_argument("--only", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--router", nargs="+", choices=FAMILIES, default=[])
    parser.add_argument("--split", default="dev", help="judge on TABLE.SPLIT.csv.gz")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    sections, embedding = [], None
    try:
        embedding = open_embedding()
        for table in args.only:
            train = read_intents(args.data / f"{table}.train.csv.gz")
            judged = args.data / f"{table}.{args.split}.csv.gz"
            dev = read_intents(judged, experts=train.experts)
            rows, why = judge(table, train, dev, embedding, args.router, args.seed)
            name = Path(embedding.stamp.id).name
            sections.append(markdown(table, train, dev, rows, why, name))
    except ComposerError as error:
        sys.exit(str(error))
    embedder = Path(embedding.stamp.id).name
    asked = f"COMPOSER_EMBEDDER={embedder} " if "COMPOSER_EMBEDDER" in os.environ else ""
    command = asked + " ".join(["python benchmarks/intents.py", *sys.argv[1:]])
    told = INTRODUCTION.format(split=args.split, embedder=embedder)
    print(f"# Intents\n\n    {command}\n\nMeasured {date.today()}: {' '.join(told.split())}\n")
    print("\n\n".join(sections))


if __name__ == "__main__":
    main()
