"""What tuning the bundled encoder to outcomes brings to trained routers.

    python benchmarks/tuned.py [--only TABLE[/POOL] …] [--objective NAME …] [--epochs N]

Two halves of train, no question in both: on one the encoder's upper layers are tuned to the
outcomes of every expert of the table (`tuning.py`) and the router is fitted, on the other both are
judged, and the other way round. Its vector of the question without options stands in place of the
bundled one's, or beside it. Dev is not read. Some five minutes of one core for each objective on
mmlu_pro, one on mix10. Prints Markdown.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from itertools import groupby
from pathlib import Path

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import CONSOLE, SHARED
from benchmarks.routing import wanted
from benchmarks.tuning import LAYERS, OBJECTIVES, TOKENS, Tuner
from composer.errors import ComposerError
from composer.routing.families import FAMILIES
from composer.routing.families.sharing import sharing
from composer.routing.outcomes import Outcomes
from composer.routing.reading import read
from composer.routing.views import Features, View, Views, rows_of
from composer.types import FloatArray
from router_training.crossfit import by_stem, fit_all
from router_training.data import load
from router_training.embedding import open_embedding
from router_training.intervals import Interval, paired
from router_training.measures import brier, earned
from router_training.split import folds, parts
from router_training.suited import grid_of

POOLS = ("mix10", "mmlu_pro/small", "mmlu_pro/all")
Values = npt.NDArray[np.float64]

INTRODUCTION = """
halves of the shared train files, each judged by what was made of the other; the shared dev files
and the part kept apart are not used. The {layers} upper layers of all-MiniLM-L6-v2 are tuned for
{epochs} epochs, texts cut at {tokens} tokens. "Over the bundled" is the paired difference in points
to the same family on the bundled encoder's vectors, with its 95 % bootstrap interval over
questions; settings are chosen for each row apart, by what they earn on the half not judged.
"Beside": both vectors one after the other, each of equal weight. "Mean": of what the family says on
either.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, default=SHARED, help="folder of the shared tables")
    parser.add_argument("--only", nargs="+", metavar="TABLE[/POOL]", default=list(POOLS))
    parser.add_argument("--objective", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES))
    parser.add_argument("--router", choices=FAMILIES, default="kernel")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    told = INTRODUCTION.format(layers=LAYERS, tokens=TOKENS, epochs=args.epochs)
    print(f"# A tuned encoder\n\n    {' '.join(['python benchmarks/tuned.py', *sys.argv[1:]])}\n")
    print(f"Measured {date.today()}: {' '.join(told.split())}\n")
    try:
        for table, same in groupby(wanted(args.data, args.only), key=lambda pool: pool[0]):
            pools = {pool: experts for _, pool, experts in same}
            outcomes = by_stem(load(args.data / f"{table}.train.csv.gz").outcomes)
            with sharing():
                for line in compared(table, pools, outcomes, args):
                    print(line, flush=True)
    except ComposerError as error:
        sys.exit(str(error))


def compared(
    table: str, pools: Mapping[str, Sequence[str]], outcomes: Outcomes, args: argparse.Namespace
) -> Iterator[str]:
    """The lines of a Markdown table for each pool."""
    fold = folds(outcomes, 2, args.seed)
    kind = FAMILIES[args.router]
    grid = grid_of(kind, outcomes)
    views: set[View] = {"embedding", "stem"}
    views |= {view for settings in grid for view in kind.views(settings)}
    texts = outcomes.text
    bundled = Views.fit(texts, views).transform(texts, open_embedding(progress).kept.encode)
    tuner = Tuner([read(text).stem for text in texts], progress)
    said: dict[str, dict[str, FloatArray]] = {pool: {} for pool in pools}  # (S, n, E) by row
    for seen, held in parts(fold):
        sides = {"bundled": bundled}
        for objective in args.objective:
            vectors = tuner.vectors(outcomes.quality, seen, objective, args.epochs, args.seed)
            sides[f"{objective}, in place"] = replaced(bundled, vectors)
            both = np.hstack([bundled["stem"], vectors]) / np.sqrt(2)
            beside = replaced(bundled, np.asarray(both, np.float32))
            sides[f"{objective}, beside"] = beside
        for pool, experts in pools.items():
            some = outcomes.of(experts)
            for name, features in sides.items():
                fitted = fit_all(kind, rows_of(features, seen), some.rows(seen), grid, args.seed)
                empty = np.empty((len(grid), *some.quality.shape), np.float32)
                out = said[pool].setdefault(name, empty)
                out[:, held] = [one.predict(rows_of(features, held)) for one in fitted]
    for pool, rows in said.items():
        for objective in args.objective:
            mean = (rows["bundled"] + rows[f"{objective}, in place"]) / np.float32(2)
            rows[f"{objective}, mean"] = mean
        some = outcomes.of(pools[pool])
        yield f"## {table}/{pool}: {len(some)} questions, {len(some.experts)} experts\n"
        yield f"| encoder | {args.router}, accuracy | over the bundled (95 %) | Brier |"
        yield "|---|---|---|---|"
        base, _ = chosen(rows["bundled"], some, fold)
        for name, predictions in sorted(rows.items(), key=lambda row: row[0] != "bundled"):
            values, quality = chosen(predictions, some, fold)
            over = paired(values - base, some.group, seed=args.seed)
            score = f"{brier(np.clip(quality, 0, 1), some):.4f}"
            over_base = "–" if name == "bundled" else shown(over)
            yield f"| {name} | {100 * values.mean():.2f} | {over_base} | {score} |"
        yield ""


def replaced(bundled: Features, vectors: FloatArray) -> Features:
    """With these vectors (n, d) of the questions without options, and of the whole where no
    question has any."""
    alike = np.array_equal(bundled["stem"], bundled["embedding"])
    names: tuple[View, ...] = ("stem", "embedding") if alike else ("stem",)
    return {**bundled, **dict.fromkeys(names, vectors)}


def chosen(
    predictions: FloatArray, outcomes: Outcomes, fold: npt.NDArray[np.int64]
) -> tuple[Values, FloatArray]:
    """(S, n, E) by S settings → (n,) what the decisions earn and (n, E), the setting of each half
    being the one that earns most on the other."""
    known = outcomes.known
    every = np.stack(
        [
            earned(outcomes.quality, np.where(known, one, -np.inf).argmax(axis=1))
            for one in predictions
        ]
    )  # (S, n)
    values, quality = np.empty(len(outcomes)), np.empty_like(predictions[0])
    for other, held in parts(fold):
        best = int(every[:, other].mean(axis=1).argmax())
        values[held], quality[held] = every[best, held], predictions[best, held]
    return values, quality


def shown(over: Interval | None) -> str:
    if over is None:
        return "–"
    return f"{100 * over.mean:+.2f} ({100 * over.low:+.2f} to {100 * over.high:+.2f})"


def progress(label: str, done: int, total: int) -> None:
    if done == total or done % 10 == 0:
        CONSOLE.print(f"{label} {done} of {total}", highlight=False)


if __name__ == "__main__":
    main()
