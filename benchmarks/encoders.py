"""What another text encoder brings to trained routers, beside the bundled one.

    python benchmarks/encoders.py --than MODEL [--only TABLE[/POOL] …] [--router FAMILY …] [--both]

Cross-fitted on train, in the folds and by the code that training itself uses, so that settings are
chosen for each encoder apart; dev is not read. With --both also one vector after the other, each of
equal weight, which no service embeds with: it tells whether they know different things. Vectors are
kept under .cache/composer, or COMPOSER_CACHE_DIR; of MODEL the first run makes them all
(all-mpnet-base-v2 on one core: half an hour for both tables of intents, hours for mmlu_pro and
routellm). Prints Markdown.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import CONSOLE, SHARED
from benchmarks.intents import TABLES as INTENTS
from benchmarks.routing import wanted
from composer.embedder import TextEmbedder, load_encoder
from composer.encoders import BUNDLED
from composer.errors import ComposerError
from composer.routing.families import FAMILIES
from composer.routing.outcomes import Outcomes
from composer.routing.views import Encode
from composer.types import BoolArray, FloatArray
from router_training.crossfit import Chosen
from router_training.data import load
from router_training.environment import process_settings
from router_training.intents import read_intents
from router_training.intervals import paired
from router_training.measures import auroc, brier, selective
from router_training.progress import Progress
from router_training.scorecard import COVERAGE, Yardstick, scorecard
from router_training.suited import suited
from router_training.train import Workshop
from router_training.vectors import KeptVectors

POOLS = (*INTENTS, "mix10", "zeroeval/without_o1_mini", "zeroeval/small", "mmlu_pro", "routellm")
ROUTERS = ("kernel", "blend", "margin")
"""Of these, those that suit the table."""

COLUMNS = ("encoder", "router", "accuracy", "over the bundled (95 %)", "Brier", "at 80 % coverage")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--than", required=True, metavar="MODEL", help="as in COMPOSER_EMBEDDER")
    parser.add_argument("--data", type=Path, default=SHARED, help="folder of the shared tables")
    parser.add_argument("--only", nargs="+", metavar="TABLE[/POOL]", default=list(POOLS))
    parser.add_argument("--router", nargs="+", choices=FAMILIES, default=list(ROUTERS))
    parser.add_argument("--both", action="store_true", help="also their vectors side by side")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    command = " ".join(["python benchmarks/encoders.py", *sys.argv[1:]])
    print(f"# Text encoders\n\n    {command}\n")
    print(f"Measured {date.today()}: {' '.join(INTRODUCTION.split())}\n")
    try:
        made = [kept(name) for name in (BUNDLED[0], args.than)]
        encoders: dict[str, Encode] = {Path(encoder.id).name: encoder.encode for encoder in made}
        if args.both:
            encoders["both"] = side_by_side(made)
        for name, outcomes in tables(args.data, args.only):
            print(f"## {name}: {len(outcomes)} questions\n")
            for line in compared(name, outcomes, encoders, args.router, args.seed):
                print(line, flush=True)
            print()
    except ComposerError as error:
        sys.exit(str(error))


INTRODUCTION = """
five-fold cross-fitting on the shared train files, settings chosen there for each encoder apart;
the shared dev files and the part kept apart are not used. "Over the bundled" is the paired
difference in points to the same family on the bundled encoder's vectors, with its 95 % bootstrap
interval over questions. Of intents, accuracy is that in scope, without rejection, and AUROC that of
the calibrated quality against being in scope.
"""


def kept(name: str) -> KeptVectors:
    settings = process_settings()
    encoder = load_encoder(
        name,
        backend=settings.embedder_backend,
        cache_dir=settings.cache_dir,
        threads=settings.threads,
    )
    bare = TextEmbedder(encoder, cache_size=0, row_cache_size=0)
    return KeptVectors(bare, settings.cache_dir / "vectors", told(Path(name).name))


def told(what: str) -> Progress:
    def progress(label: str, done: int, total: int) -> None:
        if done == total or done % 640 == 0:
            CONSOLE.print(f"{what}: {label} {done} of {total}", highlight=False)

    return progress


def side_by_side(encoders: Sequence[KeptVectors]) -> Encode:
    """The cosine of two texts is the mean of the encoders' cosines."""

    def encode(texts: Sequence[str]) -> FloatArray:
        rows = np.hstack([encoder.encode(texts) for encoder in encoders])
        return np.asarray(rows / np.sqrt(len(encoders)), np.float32)

    return encode


def tables(data: Path, only: Sequence[str]) -> Iterator[tuple[str, Outcomes]]:
    """The training parts, tables of intents first."""
    for table in INTENTS:
        if table in only:
            yield table, read_intents(data / f"{table}.train.csv.gz")
    if rest := [name for name in only if name not in INTENTS]:
        for table, pool, experts in wanted(data, rest):
            path = data / f"{table}.train.csv.gz"
            yield f"{table}/{pool}", load(path, experts=experts).outcomes


def compared(
    name: str,
    outcomes: Outcomes,
    encoders: Mapping[str, Encode],
    routers: Sequence[str],
    seed: int,
) -> Iterator[str]:
    """The lines of a Markdown table."""
    families, _ = suited(outcomes, routers)
    more: tuple[str, ...] = ("AUROC",) if outcomes.of_intents else ()
    if len(outcomes.experts) == 2:
        more = ("APGR by benchmark", "CPT80 by benchmark")
    columns = COLUMNS + more
    yield f"| {' | '.join(columns)} |"
    yield "|" + "---|" * len(columns)
    first: dict[str, Chosen] = {}
    for encoder, encode in encoders.items():
        progress = told(f"{name}, {encoder}")
        workshop = Workshop(outcomes, families, encode, seed=seed, progress=progress)
        for family in families:
            chosen = workshop.choose(family)
            base = first.setdefault(family, chosen)
            cells = [encoder, family, *measured(workshop.outcomes, chosen, base, seed)]
            yield f"| {' | '.join(cells)} |"


def measured(outcomes: Outcomes, chosen: Chosen, base: Chosen, seed: int) -> list[str]:
    """`base` is the same family on the bundled encoder's vectors."""
    inside = outcomes.in_scope if outcomes.of_intents else np.ones(len(outcomes), np.bool_)
    values, sure = chosen.values[inside], confidence(chosen)[inside]
    over = "–"
    if chosen is not base:
        found = paired(values - base.values[inside], outcomes.group[inside], seed=seed)
        assert found is not None  # every question has an outcome
        over = f"{100 * found.mean:+.2f} ({100 * found.low:.2f} to {100 * found.high:.2f})"
    cells = [percent(float(values.mean())), over, number(brier(chosen.quality, outcomes))]
    cells.append(percent(selective(values, sure, COVERAGE)))
    if outcomes.of_intents:
        cells.append(number(auroc(confidence(chosen), inside)))
    if len(outcomes.experts) == 2:
        cells += by_benchmark(outcomes, chosen, seed)
    return cells


def confidence(chosen: Chosen) -> FloatArray:
    return np.asarray(chosen.quality.max(axis=1), np.float32)


def by_benchmark(outcomes: Outcomes, chosen: Chosen, seed: int) -> list[str]:
    """Of a pair: each benchmark has its own gap between the strong and the weak expert."""
    names = np.asarray(outcomes.benchmark)
    apgr, cpt80 = [], []
    for name in np.unique(names):
        rows: BoolArray = np.asarray(names == name, np.bool_)
        judged = outcomes.rows(rows)
        card = scorecard(judged, Yardstick.fit(judged), chosen.quality[rows], seed=seed)
        apgr.append(f"{name} {number(card['apgr'])}")
        cpt80.append(f"{name} {percent(card['cpt80'])} %")
    return [", ".join(apgr), ", ".join(cpt80)]


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f}"


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


if __name__ == "__main__":
    main()
