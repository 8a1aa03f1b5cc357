"""What heads fitted to decisions bring, beside families fitted to outcomes.

    python benchmarks/objectives.py [--only TABLE[/POOL] …]

Linear heads on the kernel family's own features, one logit for each expert, drawn to its mean:
`policy` maximises what a softmax over the experts earns, `list` is ListNet's log loss against the
experts who were right, `pairs` RankNet's on each two that fared differently. Five-fold
cross-fitting on train, in the folds and with the views that training uses; dev is not read. Five
minutes of one core on both pools of mmlu_pro, one for the others. Prints Markdown.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import CONSOLE, SHARED
from benchmarks.routing import wanted
from composer.errors import ComposerError
from composer.routing.families.blend import Blend, BlendSettings
from composer.routing.families.common import softmax
from composer.routing.families.kernel import CATEGORY_FOLDS, KernelSettings
from composer.routing.families.labels import Labels, kinds_of
from composer.routing.families.points import Centres, Landmarks, Points, Table
from composer.routing.families.sharing import sharing
from composer.routing.outcomes import IntArray, Outcomes
from composer.routing.views import Features, rows_of
from composer.types import BoolArray, FloatArray
from router_training.crossfit import Chosen
from router_training.data import load
from router_training.embedding import open_embedding
from router_training.intervals import Difference, Interval, paired, verdict
from router_training.measures import earned
from router_training.split import parts
from router_training.train import Workshop

POOLS = ("mix10", "zeroeval/without_o1_mini", "zeroeval/small", "mmlu_pro/small", "mmlu_pro/all")
LANDMARKS = 500
STEPS = 40
MOST_PAIRED = 12
"""Experts above which pairs are left out: they take as long as their number squared."""

Objective = Literal["policy", "list", "pairs"]
OBJECTIVES: tuple[Objective, ...] = get_args(Objective)
WAYS = ("head", "mean", "stacked")
Values = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Head:
    """`temperature`: a difference in quality that is one logit, for the experts' means, which the
    logits are where all weights are 0, and for how near to the best an expert counts in `pairs`.
    `penalty` · ‖weights‖² / 2 is added to the loss summed over questions."""

    objective: Objective
    penalty: float
    temperature: float


GRID = (
    *(Head("policy", penalty, t) for t in (0.02, 0.05, 0.1) for penalty in (0.3, 1.0, 3.0)),
    *(Head("list", penalty, 0.2) for penalty in (1.0, 3.0, 10.0)),
    *(Head("pairs", penalty, t) for t in (0.02, 0.05) for penalty in (1.0, 3.0, 10.0)),
)

INTRODUCTION = """
five-fold cross-fitting on the shared train files; the shared dev files and the part kept apart are
not used. Each head's settings are chosen on the folds not judged, those of kernel and blend as in
training. "Mean" is that of what head and kernel say of the differences between experts, "stacked"
the blend of kernel, category, clusters and this objective's heads. In brackets the paired
difference in points, with its 95 % bootstrap interval over questions: to the kernel, and of
"stacked" to the same blend without heads.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, default=SHARED, help="folder of the shared tables")
    parser.add_argument("--only", nargs="+", metavar="TABLE[/POOL]", default=list(POOLS))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    command = " ".join(["python benchmarks/objectives.py", *sys.argv[1:]])
    print(f"# Heads fitted to decisions\n\n    {command}\n")
    print(f"Measured {date.today()}: {' '.join(INTRODUCTION.split())}\n")
    print("| pool | objective | best single | kernel | head | mean | blend | stacked |")
    print("|" + "---|" * 8)
    over: dict[tuple[Objective, str], list[Difference]] = {}
    try:
        for _, same in groupby(wanted(args.data, args.only), key=lambda pool: pool[0]):
            with sharing():
                features: list[tuple[FloatArray, FloatArray]] = []
                for table, pool, experts in same:
                    found = Pool.of(args, table, pool, experts)
                    features = features or found.features(args.seed)
                    for objective in OBJECTIVES:
                        if objective == "pairs" and len(experts) > MOST_PAIRED:
                            continue
                        print(found.line(objective, features, over, args.seed), flush=True)
    except ComposerError as error:
        sys.exit(str(error))
    for objective in OBJECTIVES:
        means = [
            shown(verdict(over[objective, way], seed=args.seed).overall)
            if (objective, way) in over
            else "–"
            for way in WAYS
        ]
        print(
            f"| mean difference | {objective} | – | – | {means[0]} | {means[1]} | – | {means[2]} |"
        )


@dataclass(frozen=True, slots=True, eq=False)
class Pool:
    name: str
    table: str
    workshop: Workshop
    kernel: Chosen
    blend: Chosen

    @classmethod
    def of(cls, args: argparse.Namespace, table: str, pool: str, experts: Sequence[str]) -> Pool:
        outcomes = load(args.data / f"{table}.train.csv.gz", experts=experts).outcomes
        encode = open_embedding(progress).kept.encode
        workshop = Workshop(
            outcomes, ["kernel", "blend"], encode, seed=args.seed, progress=progress
        )
        return cls(
            f"{table}/{pool}", table, workshop, workshop.choose("kernel"), workshop.choose("blend")
        )

    def features(self, seed: int) -> list[tuple[FloatArray, FloatArray]]:
        """For each fold those of the questions fitted on (n, D), and of those judged (m, D)."""
        outcomes, features = self.workshop.outcomes, self.workshop.features
        return [
            prepared(rows_of(features, seen), rows_of(features, held), outcomes.rows(seen), seed)
            for seen, held in parts(self.workshop.fold)
        ]

    def line(
        self,
        objective: Objective,
        features: Sequence[tuple[FloatArray, FloatArray]],
        over: dict[tuple[Objective, str], list[Difference]],
        seed: int,
    ) -> str:
        """Of a Markdown table; adds what it finds to `over`."""
        outcomes, fold = self.workshop.outcomes, self.workshop.fold
        grid = [head for head in GRID if head.objective == objective]
        said = [apart(head, features, outcomes, fold) for head in grid]
        own = specialities(self.kernel.quality)
        halves = [np.asarray((one + own) / 2, np.float32) for one in said]
        kernel = self.kernel.values
        found: dict[str, tuple[Values, Values]] = {
            "head": (settled(said, outcomes, fold), kernel),
            "mean": (settled(halves, outcomes, fold), kernel),
            "stacked": (
                stacked(said, self.blend, outcomes, fold),
                stacked([], self.blend, outcomes, fold),
            ),
        }
        cells = {}
        for way in WAYS:
            values, base = found[way]
            off = values - base
            over.setdefault((objective, way), []).append(
                Difference(self.name, self.table, off, outcomes.group)
            )
            interval = paired(off, outcomes.group, seed=seed)
            cells[way] = f"{100 * values.mean():.2f} [{shown(interval)}]"
        single = 100 * float(np.nanmean(outcomes.quality, axis=0).max())
        plain = [100 * values.mean() for values in (kernel, self.blend.values)]
        return (
            f"| {self.name} | {objective} | {single:.2f} | {plain[0]:.2f} | {cells['head']} | "
            f"{cells['mean']} | {plain[1]:.2f} | {cells['stacked']} |"
        )


def prepared(
    seen: Features, held: Features, outcomes: Outcomes, seed: int
) -> tuple[FloatArray, FloatArray]:
    """The kernel's similarity as a linear space of LANDMARKS axes, and the predicted kind, which of
    questions seen is predicted by those that had not seen them."""
    settings = KernelSettings()
    kinds = kinds_of(seen, outcomes, seed)
    labels = Labels.fit(seen, kinds, settings.sharpness)
    group, sharpness = outcomes.group, settings.sharpness
    own = labels.crossfitted(seen, kinds, group, sharpness, CATEGORY_FOLDS)
    other = labels.posterior(held)
    weights = settings.weights()
    if np.array_equal(seen["stem"], seen["embedding"]):
        weights.pop("stem")
    points, judged = Points.of(seen, own, weights), Points.of(held, other, weights)
    count = len(points.length)
    kept = np.random.default_rng(seed).choice(count, min(LANDMARKS, count), replace=False)
    centres = Centres.of(points.rows(np.sort(kept)))
    inner = points.rows(np.sort(kept)).distances(centres)
    out = []
    for some, kind in ((points, own), (judged, other)):
        table = Table(some.distances(centres), inner, b"")
        out.append(np.hstack([Landmarks.of(table, settings.gamma).primal.T, kind]))
    centre = out[0].mean(axis=0)
    return np.asarray(out[0] - centre, np.float32), np.asarray(out[1] - centre, np.float32)


def apart(
    head: Head,
    features: Sequence[tuple[FloatArray, FloatArray]],
    outcomes: Outcomes,
    fold: IntArray,
) -> FloatArray:
    """(n, E) what heads fitted on the other folds say of how experts differ, in quality."""
    out = np.empty_like(outcomes.quality)
    for (own, other), (seen, held) in zip(features, parts(fold), strict=True):
        quality = outcomes.quality[seen]
        weights = fitted(head, own, quality)
        start = np.nanmean(quality, axis=0)
        out[held] = start + head.temperature * (other @ weights)
    return specialities(out)


def fitted(head: Head, x: FloatArray, quality: FloatArray) -> FloatArray:
    """(n, D) and (n, E), NaN where missing → weights (D, E). `policy` is not convex; it starts from
    the experts' means."""
    from scipy.optimize import minimize

    known = ~np.isnan(quality)
    y = np.nan_to_num(quality).astype(np.float32)
    mean = np.nanmean(quality, axis=0)
    start = np.asarray(mean / head.temperature, np.float32)
    near = np.asarray(np.exp((mean - mean.max()) / head.temperature), np.float32)
    shape = (x.shape[1], y.shape[1])

    def loss(flat: npt.NDArray[Any]) -> tuple[float, npt.NDArray[np.float64]]:
        w = flat.reshape(shape).astype(np.float32)
        logits = np.where(known, x @ w + start, np.float32(-1e9))
        if head.objective == "pairs":
            value, gradient = pairs(logits, y, known, near)
        elif head.objective == "policy":
            value, gradient = policy(logits, y)
        else:
            value, gradient = listwise(logits, y, known)
        slope = x.T @ gradient + head.penalty * w
        return value + head.penalty / 2 * float((w**2).sum()), slope.ravel().astype(np.float64)

    options = {"maxiter": STEPS, "gtol": 1e-3}
    found = minimize(loss, np.zeros(shape).ravel(), jac=True, method="L-BFGS-B", options=options)
    return np.asarray(found.x.reshape(shape), np.float32)


def policy(logits: FloatArray, y: FloatArray) -> tuple[float, FloatArray]:
    """Less what the softmax earns, and the slope of that in the logits."""
    p = softmax(logits)
    earns = (p * y).sum(axis=1, keepdims=True)
    return -float(earns.sum()), -p * (y - earns)


def listwise(logits: FloatArray, y: FloatArray, known: BoolArray) -> tuple[float, FloatArray]:
    """Cao et al., ICML 2007, with the top-one probabilities those of the experts who were right.
    Questions on which all fared the same are left out."""
    total = y.sum(axis=1, keepdims=True)
    tells = (total > 0) & (total < known.sum(axis=1, keepdims=True))
    target = np.where(tells, y / np.maximum(total, 1e-6), 0)
    p = softmax(logits)
    value = -float((target * np.log(np.maximum(p, 1e-12))).sum())
    return value, np.asarray(np.where(tells, p, 0) - target, np.float32)


def pairs(
    logits: FloatArray, y: FloatArray, known: BoolArray, near: FloatArray
) -> tuple[float, FloatArray]:
    """Burges et al., ICML 2005. Experts count by how `near` (E,) they are to the best."""
    value, slope = 0.0, np.empty_like(logits)
    for start in range(0, len(logits), 512):
        part = slice(start, start + 512)
        off = logits[part, :, None] - logits[part, None]  # (b, E, E)
        count = np.maximum(y[part, :, None] - y[part, None], 0) * near[:, None] * near
        count = count * (known[part, :, None] & known[part, None])
        value += float((count * np.logaddexp(0, -off)).sum())
        pull = -count / (1 + np.exp(np.clip(off, -50, 50)))
        slope[part] = pull.sum(axis=2) - pull.sum(axis=1)
    return value, slope


def specialities(said: FloatArray) -> FloatArray:
    """(n, E) → the same less each question's mean."""
    return np.asarray(said - said.mean(axis=1, keepdims=True), np.float32)


def decisions(said: FloatArray, outcomes: Outcomes) -> Values:
    best = np.where(outcomes.known, said, -np.inf).argmax(axis=1)
    return earned(outcomes.quality, best)


def settled(said: Sequence[FloatArray], outcomes: Outcomes, fold: IntArray) -> Values:
    """(n,) what the decisions earn with the settings that earn most on the other folds."""
    every = np.stack([decisions(one, outcomes) for one in said])
    out = np.empty(len(outcomes))
    for seen, held in parts(fold):
        out[held] = every[int(every[:, seen].mean(axis=1).argmax()), held]
    return out


def stacked(
    said: Sequence[FloatArray], blend: Chosen, outcomes: Outcomes, fold: IntArray
) -> Values:
    """(n,) what the blend's members and these heads earn, by weights from the other folds."""
    every = np.stack([*(member.raw for member in blend.members), *said])
    out = np.empty_like(outcomes.quality)
    for seen, held in parts(fold):
        weights = Blend.of([], every[:, seen], outcomes.rows(seen), BlendSettings())
        out[held] = weights.weighed(every[:, held])
    return decisions(out, outcomes)


def shown(over: Interval | None) -> str:
    if over is None:
        return "–"
    return f"{100 * over.mean:+.2f}, {100 * over.low:+.2f} to {100 * over.high:+.2f}"


def progress(label: str, done: int, total: int) -> None:
    if done == total:
        CONSOLE.print(label, highlight=False)


if __name__ == "__main__":
    main()
