"""An expert that a router was not trained on: expected quality and routing with it, by K outcomes.

    python benchmarks/joining.py [--split dev] [--router NAME] [--rows N] [--draws N] [--only …]

Each expert in turn is unknown: an artefact is trained on the train file without it, it joins by K
of its outcomes there, and the questions of the judged split are routed with it. Beside it: its mean
over the same K, and the family trained on everything known so far, these K among it. Settings of
joining are learnt from the known experts alone; the judged split decides nothing. The last table
has specialists: clinc150's ten domains as experts, each right for its own queries alone, of which
the new one's were never seen; it joins by eight example queries. Prints Markdown.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy.stats import spearmanr

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import SHARED, progress
from composer.routing.artefact import DataStamp, EmbedderStamp, ExpertStamp, Manifest
from composer.routing.families import FAMILIES
from composer.routing.family import predicted
from composer.routing.joining import JoinPrior, Newcomers
from composer.routing.model import LearnedModel
from composer.routing.outcomes import Outcomes
from composer.routing.views import Features, Views, rows_of
from composer.types import FloatArray
from router_training.crossfit import (
    by_stem,
    calibrated_apart,
    calibration_of,
    folds_by_stem,
    out_of_fold,
)
from router_training.data import load
from router_training.embedding import Embedding, open_embedding
from router_training.errors import DataError
from router_training.groups import groups_of
from router_training.intervals import paired
from router_training.joining import join
from router_training.pools import read_pools
from router_training.tables import read_table

POOLS = ("mix10/all", "zeroeval/small", "mmlu_pro/small")
SPECIALISTS = "clinc150/domains"
SHOTS = (0, 4, 16, 64)
ALL = 10**9
EXAMPLES = 8

Values = npt.NDArray[np.float64]


@dataclass
class Measured:
    """Of one way to know the new expert: squared errors and gains over routing without it, (n,)
    each and one for every expert and draw; rank correlations and shares of the traffic."""

    error: list[Values] = field(default_factory=list)
    gain: list[Values] = field(default_factory=list)
    rank: list[float] = field(default_factory=list)
    share: list[float] = field(default_factory=list)

    def add(
        self, said: FloatArray, known: FloatArray, outcome: Values, others: Values, bar: Values
    ) -> None:
        """`said` (n,) of the new expert, `known` (n, E) of the others; `outcome` (n,) is its own,
        `others` (n, E) theirs, `bar` (n,) what is earned without it."""
        new = said > known.max(axis=1)
        rest = others[np.arange(len(said)), known.argmax(axis=1)]
        self.error.append((said - outcome) ** 2)
        self.gain.append(np.where(new, outcome, rest) - bar)
        self.share.append(float(new.mean()))
        if np.ptp(said) > 0 and np.ptp(outcome) > 0:
            self.rank.append(float(spearmanr(said, outcome)[0]))

    def cells(self, group: npt.NDArray[np.int64]) -> list[str]:
        rank = f"{np.mean(self.rank):.3f}" if self.rank else "–"
        error, gain = (np.mean(v, axis=0) for v in (self.error, self.gain))
        return [
            _interval(error, group, 1, ".4f"),
            rank,
            _interval(gain, group, 100, "+.2f"),
            f"{100 * np.mean(self.share):.1f}",
        ]


def _interval(values: Values, group: npt.NDArray[np.int64], scale: float, form: str) -> str:
    around = paired(values, group)
    assert around is not None
    low, mean, high = (scale * v for v in (around.low, around.mean, around.high))
    return f"{mean:{form}} [{low:{form}}, {high:{form}}]"


class Shop:
    """One table's questions made ready for artefacts of some of its experts: the default settings
    of one family, and none of the figures that training also works out."""

    def __init__(
        self, train: Outcomes, judged: Outcomes, router: str, embedding: Embedding, seed: int
    ) -> None:
        self.train, self.judged = by_stem(train), judged
        self.kind = FAMILIES[router]
        self.chosen = next(iter(self.kind.grid()))
        self.seed = seed
        self.stamp: EmbedderStamp = embedding.stamp
        self.encode = embedding.kept.encode
        names = {"embedding", *self.kind.views(self.chosen)}
        self.views = Views.fit(self.train.text, names)
        self.features = self.views.transform(self.train.text, self.encode)
        self.asked: Features = self.views.transform(judged.text, self.encode)
        self.fold = folds_by_stem(self.train, seed)

    def fit(self, experts: Sequence[str], rows: npt.NDArray[np.int64] | None = None) -> Fitted:
        """An artefact that knows these experts, from all questions or these `rows` of them."""
        rows = np.arange(len(self.train)) if rows is None else rows
        outcomes = self.train.of(experts).rows(rows)
        features, fold = rows_of(self.features, rows), self.fold[rows]
        (said,) = out_of_fold(self.kind, [self.chosen], features, outcomes, fold, self.seed)
        quality = calibrated_apart(said, outcomes, fold)
        vectors = features["embedding"]
        prior = JoinPrior.fit(quality, outcomes, vectors, seed=self.seed)
        means = np.nanmean(outcomes.quality, axis=0)
        manifest = Manifest(
            family=self.kind.name,
            settings=self.chosen.model_dump(mode="json"),
            embedder=self.stamp,
            experts=tuple(
                ExpertStamp(id=expert, quality=float(mean))
                for expert, mean in zip(experts, means, strict=True)
            ),
            data=DataStamp(source="", digest="", questions=len(outcomes)),
        )
        family = self.kind.fit(features, outcomes, self.chosen, self.seed)
        model = LearnedModel(
            manifest,
            self.views,
            family,
            calibration_of(said.quality, outcomes, said.signs),
            None,
            Newcomers(prior, {}),
        )
        return Fitted(self, model, model.score_features(self.asked).quality)


@dataclass
class Fitted:
    """An artefact and what it says of the judged questions, `known` (n, E)."""

    shop: Shop
    model: LearnedModel
    known: FloatArray

    def joined(
        self, expert: str, claims: Sequence[str] = (), shots: Outcomes | None = None
    ) -> FloatArray:
        """(n,) what is said of the judged questions of an expert that joins by these."""
        if not claims and not shots:
            mean: FloatArray = self.known.mean(axis=1)  # of whom nothing is known
            return mean
        model = join(self.model, expert, self.shop.encode, claims=claims, outcomes=shots)
        vectors = self.shop.asked["embedding"]
        said: FloatArray = model.newcomers.scores(self.known, vectors)[0][:, 0]
        return said

    def trained_on(self, outcomes: Outcomes) -> FloatArray:
        """(n, E) of the same family, trained anew on other outcomes of the same questions, with
        the one map of calibration that this artefact has for all."""
        shop = self.shop
        family = shop.kind.fit(shop.features, outcomes, shop.chosen, shop.seed)
        raw = predicted(family, shop.asked).quality
        own = self.model.calibration
        b, covariance = (
            np.repeat(part[:1], raw.shape[1], axis=0) for part in (own.b, own.covariance)
        )
        quality: FloatArray = replace(own, b=b, covariance=covariance).quality(raw)[0]
        return quality


# --- generalists --------------------------------------------------------------------------


def pool_table(args: argparse.Namespace, name: str, embedding: Embedding) -> str:
    table, _, pool = name.partition("/")
    experts = read_pools(args.data / "pools.json")[table][pool]
    train = load(args.data / f"{table}.train.csv.gz", experts=experts).outcomes
    judged = load(args.data / f"{table}.{args.split}.csv.gz", experts=experts).outcomes
    rng = np.random.default_rng(args.seed)
    if len(train) > args.rows:
        train = train.rows(np.sort(rng.permutation(len(train))[: args.rows]))
    shop = Shop(train, judged, args.router, embedding, args.seed)
    all_quality = shop.fit(experts).known
    strongest = int(np.argmax(np.nanmean(train.quality, axis=0)))
    found: dict[tuple[str, int], Measured] = {}
    best: dict[tuple[str, int], Measured] = {}
    accuracy = []
    with progress(name, len(experts)) as step:
        for e, expert in enumerate(experts):
            others = [one for one in experts if one != expert]
            fitted = shop.fit(others)
            outcome = judged.quality[:, e].astype(np.float64)
            theirs = judged.of(others).quality.astype(np.float64)
            rows = np.arange(len(theirs))
            accuracy.append(theirs[rows, fitted.known.argmax(axis=1)])
            wheres = (found, best) if e == strongest else (found,)

            def add(
                way: str,
                k: int,
                said: FloatArray,
                known: FloatArray = fitted.known,
                outcome: Values = outcome,
                theirs: Values = theirs,
                bar: Values = accuracy[-1],
                wheres: Sequence[dict[tuple[str, int], Measured]] = wheres,
            ) -> None:
                for where in wheres:
                    where.setdefault((way, k), Measured()).add(said, known, outcome, theirs, bar)

            add("trained on everything", ALL, all_quality[:, e], np.delete(all_quality, e, axis=1))
            add("joined by 8 examples", 0, fitted.joined(expert, examples_of(train, e)))
            for k in SHOTS:
                for _ in range(args.draws if k else 1):
                    chosen = rng.permutation(len(train))[:k]
                    shots = shop.train.rows(chosen)
                    add("joined", k, fitted.joined(expert, shots=shots))
                    mean = train.of(others).quality.mean() if not k else shots.quality[:, e].mean()
                    add("its mean over the K", k, np.full(len(judged), mean, np.float32))
                    if k:
                        few = shop.train.quality.copy()
                        few[:, e] = np.nan
                        few[chosen, e] = shots.quality[:, e]
                        said = fitted.trained_on(replace(shop.train, quality=few))
                        rest = np.delete(said, e, axis=1)
                        add("trained on the K, too", k, said[:, e], rest)
            step()
    base = 100 * float(np.mean(accuracy))
    lines = [
        f"## {name}: {len(experts)} experts, {len(train)} questions, judged on {len(judged)}",
        "",
        f"Accuracy without the new expert {base:.2f} on average over who is missing. Gains are "
        f"points over that; the last two columns are those where {experts[strongest]}, the best "
        "single expert, is the new one.",
        "",
        "| K | known by | Brier | rank corr. | gain | its share, % | gain, the best | its share |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for way, k in sorted(found, key=lambda key: key[1]):
        cells = found[way, k].cells(judged.group)
        lines.append(
            f"| {'all' if k == ALL else k} | {way} | "
            + " | ".join([*cells, *best[way, k].cells(judged.group)[2:]])
            + " |"
        )
    return "\n".join(lines)


def examples_of(train: Outcomes, e: int) -> list[str]:
    """What somebody who knows the expert would show: questions of the category in which it is
    furthest above the others, right or wrong."""
    lead = train.quality[:, e] - np.nanmean(np.delete(train.quality, e, axis=1), axis=1)
    kinds = np.array([f"{b}/{c}" for b, c in zip(train.benchmark, train.category, strict=True)])
    names, counts = np.unique(kinds, return_counts=True)
    names = names[counts >= EXAMPLES] if (counts >= EXAMPLES).any() else names
    best = max(names, key=lambda name: float(np.nanmean(lead[kinds == name])))
    rows = np.flatnonzero(kinds == best)[:EXAMPLES]
    return [train.text[i] for i in rows]


# --- specialists --------------------------------------------------------------------------


def specialists(args: argparse.Namespace, embedding: Embedding) -> str:
    train = domains(args.data / "clinc150.train.csv.gz")
    judged = domains(args.data / f"clinc150.{args.split}.csv.gz").of(train.experts)
    rng = np.random.default_rng(args.seed)
    train = train.rows(np.sort(rng.permutation(len(train))[: args.rows]))
    experts = list(train.experts)
    shop = Shop(train, judged, args.router, embedding, args.seed)
    said = shop.fit(experts).known
    rows = np.arange(len(judged))
    found: dict[str, list[tuple[Values, Values, Values]]] = {}

    def add(way: str, quality: FloatArray, e: int) -> None:
        """`quality` (n, E) has the new expert last."""
        order = [*(i for i in range(len(experts)) if i != e), e]
        right = judged.quality[:, order][rows, quality.argmax(axis=1)].astype(np.float64)
        own = judged.quality[:, e] == 1
        error = (np.maximum(quality[:, -1], 0).astype(np.float64) - judged.quality[:, e]) ** 2
        found.setdefault(way, []).append((right, np.where(own, right, np.nan), error))

    with progress(SPECIALISTS, len(experts)) as step:
        for e, expert in enumerate(experts):
            own = np.flatnonzero(train.quality[:, e] == 1)
            strange = np.flatnonzero(train.quality[:, e] == 0)
            fitted = shop.fit([one for one in experts if one != expert], strange)
            known = fitted.known
            add("nothing: it is left out", np.hstack([known, np.full((len(known), 1), -1.0)]), e)
            name = expert.replace("_", " ")
            add("its name", np.hstack([known, fitted.joined(expert, [name])[:, None]]), e)
            for _ in range(args.draws):
                texts = [train.text[i] for i in rng.permutation(own)[:EXAMPLES]]
                new = fitted.joined(expert, texts)
                add(f"{EXAMPLES} examples", np.hstack([known, new[:, None]]), e)
                for k in SHOTS[1:]:
                    # Half of them its own, as of somebody who tries it out.
                    mixed = [*rng.permutation(own)[: k // 2]]
                    mixed += [*rng.permutation(strange)[: k - k // 2]]
                    shots = shop.train.rows(np.array(mixed))
                    new = fitted.joined(expert, texts, shots)
                    way = f"{EXAMPLES} examples, {k} outcomes"
                    add(way, np.hstack([known, new[:, None]]), e)
            order = [*(i for i in range(len(experts)) if i != e), e]
            add("training on everything", said[:, order], e)
            step()
    lines = [
        f"## {SPECIALISTS}: {len(experts)} experts, {len(train)} queries, judged on {len(judged)}",
        "",
        "| known by | accuracy | on its own queries | Brier |",
        "|---|---|---|---|",
    ]
    for way, every in found.items():
        right, own_right, error = (np.array([v[i] for v in every]) for i in range(3))
        own_mean = np.nanmean(own_right, axis=0)
        asked = ~np.isnan(own_mean)
        lines.append(
            f"| {way} | {_interval(right.mean(axis=0), judged.group, 100, '.1f')} | "
            f"{_interval(own_mean[asked], judged.group[asked], 100, '.1f')} | "
            f"{_interval(error.mean(axis=0), judged.group, 1, '.4f')} |"
        )
    return "\n".join(lines)


def domains(path: Path) -> Outcomes:
    """Each query in scope, which the expert of its domain alone can answer."""
    columns = read_table(path).columns
    if "domain" not in columns:
        raise DataError.of(str(path), "there is no column domain", "Name the folder of clinc150.")
    kept = [i for i, domain in enumerate(columns["domain"]) if domain != "oos"]
    owner = [str(columns["domain"][i]) for i in kept]
    text = tuple(str(columns["query"][i]) for i in kept)
    experts = tuple(sorted(set(owner)))
    quality = np.array([[one == expert for expert in experts] for one in owner], np.float32)
    return Outcomes(
        experts=experts,
        text=text,
        quality=quality,
        cost=np.full_like(quality, np.nan),
        category=tuple(owner),
        benchmark=("clinc150",) * len(owner),
        group=groups_of(text, [None] * len(text)),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, default=SHARED, help="folder of the shared tables")
    parser.add_argument("--split", default="dev", help="the part that is judged on")
    parser.add_argument("--router", default="neighbours", choices=FAMILIES)
    parser.add_argument("--rows", type=int, default=2500, help="questions to train on, at most")
    parser.add_argument("--draws", type=int, default=5, help="of the K outcomes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=(*POOLS, SPECIALISTS))
    args = parser.parse_args()
    embedding = open_embedding()
    wanted = args.only or (*POOLS, SPECIALISTS)
    command = " ".join(["python benchmarks/joining.py", *sys.argv[1:]])
    print(f"# An expert joins a trained router\n\n    {command}\n")
    print(
        f"Measured {date.today()}; family `{args.router}`, all-MiniLM-L6-v2. Each expert in turn "
        f"is unknown; {args.draws} draws of the K. 95 % bootstrap intervals over questions in "
        "brackets, of means over experts and draws."
    )
    for name in wanted:
        if name == SPECIALISTS:
            text = specialists(args, embedding)
        else:
            text = pool_table(args, name, embedding)
        print(f"\n{text}", flush=True)


if __name__ == "__main__":
    main()
