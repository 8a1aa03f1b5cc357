"""All families of trained routers and the published methods on every shared table and pool.

    python benchmarks/routing.py [--only TABLE[/POOL] …] [--judged SPLIT] [--json FILE]
    python benchmarks/routing.py --merge FILE …

Settings are chosen by cross-validation on train, each method is fitted once on train, and the split
named by `--judged` (dev unless told) is judged on once. Prints the Markdown of
benchmarks/results/routing.md. One thread; on two cores the whole is made in two processes, each a
part of the tables, which are then merged (`WHOLE`, below). Vectors are kept under .cache/composer,
so that a second run does not embed again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from datetime import date
from itertools import groupby
from pathlib import Path

from pydantic import ValidationError
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import CONSOLE, SHARED
from composer.errors import ComposerError
from composer.routing.families import FAMILIES
from composer.routing.families.sharing import sharing
from router_training.compare import compare
from router_training.compared import COMPARISONS, Comparison
from router_training.comparison import markdown
from router_training.data import load
from router_training.embedding import Embedding, open_embedding
from router_training.pools import BESIDE, read_pools
from router_training.progress import Progress
from router_training.published import PUBLISHED

WHOLE = """\
python benchmarks/routing.py --only mmlu_pro --json one.json &
python benchmarks/routing.py --only routellm zeroeval mix10 --json two.json &
wait; python benchmarks/routing.py --merge one.json two.json"""
"""How results/routing.md is made: some 20 core-minutes each, at 1.5 GB."""

TABLES = ("mix10", "zeroeval", "mmlu_pro", "routellm")

INTRODUCTION = """
fitted on the shared train files, settings by five-fold cross-validation there, judged once on the
shared {split} files (questions marked as contaminated are left out); all-MiniLM-L6-v2 vectors; 95 %
bootstrap intervals over questions in brackets. "Over" a router is the paired difference in points.
"Uncalibrated" is the accuracy of the family's own predictions, "cross-fitted" that on train by
which settings and, for `best` (in bold), families are chosen; of two experts without prices that is
the mean over all shares of calls to the stronger one. Families have their default settings unless
others are better by more than a standard error; the published methods the best of theirs, and
decide by their own predictions, uncalibrated:
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, default=SHARED, help="folder of the shared tables")
    parser.add_argument("--only", nargs="+", metavar="TABLE[/POOL]", help="default: all")
    parser.add_argument("--judged", default="dev", metavar="SPLIT", help="TABLE.SPLIT.csv.gz")
    parser.add_argument("--router", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write it for --merge")
    parser.add_argument("--merge", nargs="+", type=Path, metavar="FILE", help="print these alone")
    args = parser.parse_args()
    try:
        done = compared(args) if args.merge is None else merged(args.merge)
    except ComposerError as error:
        sys.exit(str(error))
    if args.json is not None:
        args.json.write_bytes(COMPARISONS.dump_json(done))
    introduction = " ".join(INTRODUCTION.format(split=args.judged).split())
    papers = "; ".join(f"{method.name} {method.paper}" for method in PUBLISHED.values())
    command = WHOLE if args.merge else " ".join(["python benchmarks/routing.py", *sys.argv[1:]])
    print(f"# Routing on real outcomes\n\n```\n{command}\n```\n")
    print(f"Measured {date.today()}: {introduction} {papers}.\n")
    print(markdown(done), end="")


def merged(files: Sequence[Path]) -> list[Comparison]:
    """Of several runs, table by table. Exits with a message for a file that is not of such."""
    done: list[Comparison] = []
    for file in files:
        try:
            done += COMPARISONS.validate_json(file.read_bytes())
        except (OSError, ValidationError) as error:
            sys.exit(f"{file} is not what --json wrote ({error}); write it anew")
    return sorted(done, key=lambda c: TABLES.index(c.table))


def compared(args: argparse.Namespace) -> list[Comparison]:
    """Pools of one table share what does not depend on the experts."""
    pools = wanted(args.data, args.only)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    done: list[Comparison] = []
    with Bars(*columns, TimeElapsedColumn(), console=CONSOLE) as bars:
        whole = bars.add_task("pools", total=len(pools))
        step = bars.add_task("", total=1)

        def progress(label: str, now: int, total: int) -> None:
            bars.update(step, description=label, completed=now, total=total)

        embedding = open_embedding(progress)
        for table, same in groupby(pools, key=lambda pool: pool[0]):
            with sharing():
                for number, (_, pool, experts) in enumerate(same):
                    bars.update(whole, description=f"{table}/{pool}")
                    found = one(args, embedding, table, pool, experts, progress, timed=number == 0)
                    done.append(found)
                    bars.advance(whole)
    return done


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
    *,
    timed: bool,
) -> Comparison:
    train = load(args.data / f"{table}.train.csv.gz", experts=experts)
    judged = load(args.data / f"{table}.{args.judged}.csv.gz", experts=experts)
    return compare(
        table,
        pool,
        train.outcomes,
        judged.rows(~judged.contaminated).outcomes,
        embedding.kept.encode,
        embedding.stamp,
        families=args.router,
        encode_anew=embedding.encode_anew if timed else None,
        seed=args.seed,
        progress=progress,
    )


if __name__ == "__main__":
    main()
