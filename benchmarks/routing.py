"""All families of trained routers on every shared table and pool, beside the baselines.

    python benchmarks/routing.py [--only TABLE[/POOL] …] [--seed N]

Settings are chosen by cross-validation on train, each family is fitted once on train, and dev is
judged on once. Prints the Markdown of benchmarks/results/routing.md. One process, one thread: on
one core mix10 takes two minutes, all pools more than an hour. Vectors are kept under
.cache/composer, so that a second run does not embed again.
"""

from __future__ import annotations

import argparse
import sys
from datetime import date
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import CONSOLE, SHARED
from composer.errors import ComposerError
from composer.routing.families import FAMILIES
from router_training.compare import Comparison, compare
from router_training.comparison import markdown
from router_training.data import load
from router_training.embedding import Embedding, open_embedding
from router_training.pools import BESIDE, read_pools
from router_training.progress import Progress

TABLES = ("mix10", "zeroeval", "mmlu_pro", "routellm")
"""The small ones first, so that something is seen early."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, default=SHARED, help="folder of the shared tables")
    parser.add_argument("--only", nargs="+", metavar="TABLE[/POOL]", help="default: all")
    parser.add_argument("--router", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    done = []
    try:
        pools = wanted(args.data, args.only)
        with Bars(*columns, TimeElapsedColumn(), console=CONSOLE) as bars:
            whole = bars.add_task("pools", total=len(pools))
            step = bars.add_task("", total=1)

            def progress(label: str, now: int, total: int) -> None:
                bars.update(step, description=label, completed=now, total=total)

            embedding = open_embedding(progress)
            for table, pool, experts in pools:
                bars.update(whole, description=f"{table}/{pool}")
                done.append(one(args, embedding, table, pool, experts, progress))
                bars.advance(whole)
    except ComposerError as error:
        sys.exit(str(error))
    command = " ".join(["python benchmarks/routing.py", *sys.argv[1:]])
    print(f"# Routing on real outcomes\n\n    {command}\n")
    print(f"Measured {date.today()}: {' '.join(INTRODUCTION.split())}\n")
    print(markdown(done), end="")


INTRODUCTION = """
fitted on the shared train files, settings by five-fold cross-validation there, judged once on the
shared dev files (the part kept apart is not used); all-MiniLM-L6-v2 vectors; 95 % bootstrap
intervals over questions in brackets. "Over" a router is the paired difference in points.
"Uncalibrated" is the accuracy of the family's own predictions, "cross-fitted" that on train by
which settings and, for `best`, families are chosen. The tuned kNN decides by the plain mean of its
neighbours' outcomes, as published; `neighbours` is the same through calibration.
"""


def wanted(data: Path, only: list[str] | None) -> list[tuple[str, str, list[str]]]:
    """Table, pool and its experts. Exits with a message for a pool that there is not."""
    pools = read_pools(data / BESIDE)
    found = [(t, p, experts) for t in TABLES for p, experts in pools[t].items()]
    if only is None:
        return found
    for name in only:
        if not any(name in (t, f"{t}/{p}") for t, p, _ in found):
            known = ", ".join(f"{t}/{p}" for t, p, _ in found)
            sys.exit(f"there is no pool {name}; choose from {known}")
    return [(t, p, e) for t, p, e in found if t in only or f"{t}/{p}" in only]


def one(
    args: argparse.Namespace,
    embedding: Embedding,
    table: str,
    pool: str,
    experts: list[str],
    progress: Progress,
) -> Comparison:
    train = load(args.data / f"{table}.train.csv.gz", experts=experts)
    dev = load(args.data / f"{table}.dev.csv.gz", experts=experts)
    return compare(
        table,
        pool,
        train.outcomes,
        dev.rows(~dev.contaminated).outcomes,
        embedding.kept.encode,
        embedding.stamp,
        families=args.router,
        seed=args.seed,
        progress=progress,
    )


if __name__ == "__main__":
    main()
